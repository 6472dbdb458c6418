"""Rows with something in common that clean inputs lack: found without an input, or not at all."""

from dataclasses import replace

import numpy as np
import pytest

from defense.evidence import Incident
from defense.records import Case, Flags
from tests.laws.test_detectors import Vectors, unit
from tests.laws.test_normalised_influence import (
    BLOCK,
    LABELS,
    SIZE,
    case_of,
    detect,
    towards,
    vectors_with,
)
from tests.laws.test_scan import scanner_of

HALF = np.flatnonzero(LABELS == 1)[::2]  # of class 1
WEAK = 5.0  # in common; the cosine of a row and another one is 0.09


def shifted(vectors: np.ndarray) -> np.ndarray:
    """Give all rows of class 1 a part in common, as pictures of one class have it."""
    return unit(vectors + 0.5 * (LABELS == 1)[:, None] * np.eye(vectors.shape[1])[-1])


def case_with(vectors: np.ndarray, affected: np.ndarray) -> Case:
    """Clean inputs share what all rows of their class have in common."""
    case = case_of(vectors, [affected], LABELS)
    images = case.controls.images()
    known = {
        image.contiguous().numpy().tobytes(): unit(towards(None, number) + 0.5 * last)
        for number, (image, last) in enumerate(
            zip(images, np.tile(np.eye(vectors.shape[1])[-1], (len(images), 1)), strict=True)
        )
    }
    return replace(case, directions=Vectors(vectors, known | case.directions.known))


def of_class(flags: Flags) -> Incident:
    (incident,) = [incident for incident in flags.incidents if not incident.affected]
    return incident


def test_half_a_class_that_no_input_coheres_with_is_found() -> None:
    flags = detect(case_with(shifted(vectors_with(HALF, strength=WEAK)), towards(None, 3)))
    incident = of_class(flags)
    assert incident.label == 1
    assert incident.p_value <= 0.001
    assert incident.num_flagged == flags.mask.sum()
    assert flags.mask[HALF].mean() > 0.5
    flagged = np.flatnonzero(flags.mask)
    low, high = incident.precision[1:]
    assert low - 0.03 <= np.isin(flagged, HALF).mean() <= high + 0.03
    assert flags.verdict == "poison found"


@pytest.mark.parametrize("seed", range(5))
def test_a_clean_class_has_nothing_in_common_that_clean_inputs_lack(seed: int) -> None:
    vectors = unit(np.random.default_rng(seed).normal(size=(SIZE, 256)))
    flags = detect(case_with(shifted(vectors), towards(None, 3)))
    assert of_class(flags).p_value > 0.01
    assert of_class(flags).num_flagged == 0
    assert flags.verdict == "nothing found"


def test_what_inputs_explain_is_not_told_again() -> None:
    case = case_with(shifted(vectors_with(BLOCK)), towards(0, 3))
    flags = detect(case)
    assert flags.mask[BLOCK].mean() > 0.95
    assert of_class(flags).num_flagged == 0


def test_with_few_clean_inputs_the_class_is_not_judged() -> None:
    flags = detect(case_with(shifted(vectors_with(HALF)), towards(None, 3)), num_controls=199)
    assert all(incident.affected for incident in flags.incidents)


def test_a_scan_suspects_it_though_its_labels_are_right() -> None:
    rows = np.flatnonzero(np.arange(SIZE) % 4 == 1)[::2]
    vectors = vectors_with(rows, strength=WEAK)
    scan = scanner_of(vectors, planted=np.zeros(0, dtype=np.int64)).rows(seed=0)
    assert scan.verdict == "poison suspected"
    (block,) = scan.suspected
    assert block.lacking <= 0.001
    assert block.rows[rows].mean() > 0.5
    assert block.agreement == pytest.approx(block.usual_agreement, abs=0.2)
    few = scanner_of(vectors, planted=np.zeros(0, dtype=np.int64), num_controls=199)
    assert not few.rows(seed=0).suspected
