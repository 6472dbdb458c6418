"""Rows with something in common that clean inputs lack: found without an input, or not at all."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from defense.detectors.controls import Controls
from defense.detectors.normalised_influence import NormalisedInfluence
from defense.detectors.search import CleanInputs, Search
from defense.detectors.subpopulation import subpopulation
from defense.detectors.whitening import Whitened
from defense.evidence import Incident
from defense.records import Case, Flags
from tests.laws.blocks import (
    LABELS,
    SIZE,
    case_of,
    detect,
    towards,
    vectors_with,
)
from tests.laws.cases import Vectors, unit
from tests.laws.scanners import scanner_of

HALF = np.flatnonzero(LABELS == 1)[::2]  # of class 1
LARGE = np.flatnonzero(LABELS == 1)[::8]  # an eighth of it
WEAK = 5.0  # in common; the cosine of a row and another one is 0.09


def shifted(vectors: np.ndarray) -> np.ndarray:
    """Give all rows of class 1 a part in common, as pictures of one class have it."""
    return unit(vectors + 0.5 * (LABELS == 1)[:, None] * np.eye(vectors.shape[1])[-1])


def case_with(vectors: np.ndarray, affected: np.ndarray) -> Case:
    """Clean inputs share what all rows of their class have in common."""
    case = case_of(vectors, [affected], LABELS)
    last = 0.5 * np.eye(vectors.shape[1])[-1]
    known = {
        image.contiguous().numpy().tobytes(): unit(towards(None, number) + last)
        for number, image in enumerate(case.controls.images())
    }
    return replace(case, directions=Vectors(vectors, known | case.directions.known))


def of_class(flags: Flags) -> Incident:
    (incident,) = [incident for incident in flags.incidents if not incident.affected]
    return incident


def test_half_a_class_that_no_input_coheres_with_is_found() -> None:
    flags = detect(case_with(shifted(vectors_with(HALF, strength=WEAK)), towards(None, 3)))
    incident = of_class(flags)
    assert (incident.label, incident.p_value) == (1, None)
    assert incident.num_flagged == flags.mask.sum()
    assert flags.mask[HALF].mean() > 0.5
    flagged = np.flatnonzero(flags.mask)
    low, high = incident.precision[1:]
    assert low - 0.03 <= np.isin(flagged, HALF).mean() <= high + 0.03
    assert flags.verdict == "poison found"


@pytest.mark.parametrize("rows", ["predicted_label", "all"])
@pytest.mark.parametrize("seed", range(3))
def test_a_clean_class_has_nothing_in_common_that_clean_inputs_lack(seed: int, rows: str) -> None:
    vectors = unit(np.random.default_rng(seed).normal(size=(SIZE, 256)))
    flags = detect(case_with(shifted(vectors), towards(None, 3)), rows=rows)
    assert of_class(flags).num_flagged == 0
    assert of_class(flags).num_controls == 100
    assert flags.verdict == "nothing found"


def test_what_an_input_explains_is_not_told_again() -> None:
    vectors = shifted(vectors_with(LARGE))
    without = detect(case_with(vectors, towards(None, 3)))
    assert of_class(without).num_flagged >= len(LARGE) * 0.9
    flags = detect(case_with(vectors, towards(0, 3)))
    assert flags.mask[LARGE].mean() > 0.95
    assert of_class(flags).num_flagged == 0


def test_two_causes_in_a_class_are_both_told() -> None:
    first, second = np.split(np.flatnonzero(LABELS == 1)[: 2 * len(LARGE)], 2)
    vectors = vectors_with(first, second)
    vectors[[*first, *second], 2] += 0.45
    flags = detect(case_with(shifted(unit(vectors)), towards(None, 3)))
    assert of_class(flags).num_flagged > 1.8 * len(LARGE)
    assert flags.mask[first].mean() > 0.9
    assert flags.mask[second].mean() > 0.9


def test_a_share_of_a_class_is_told_only_if_it_is_large_enough() -> None:
    case = case_with(shifted(vectors_with(LARGE)), towards(None, 3))
    assert detect(case, subpopulation=0.2).verdict == "nothing found"
    flags = detect(case, subpopulation=0.1)
    assert flags.mask[LARGE].mean() > 0.9


@pytest.mark.parametrize("options", [{"num_controls": 199}, {"subpopulation": None}])
def test_a_class_that_is_not_looked_at_as_a_whole_is_named(options) -> None:
    flags = detect(case_with(shifted(vectors_with(HALF)), towards(None, 3)), **options)
    assert (of_class(flags).num_controls, of_class(flags).num_flagged) == (0, 0)
    scan = scanner_of(vectors_with(), **options).rows(seed=0)
    assert (scan.unchecked, scan.in_part) == ((), (0, 1, 2, 3))


@pytest.mark.parametrize("strength", [3.5, 12.0])
def test_a_scan_suspects_it_though_its_labels_are_right(strength: float) -> None:
    rows = np.flatnonzero(np.arange(SIZE) % 4 == 1)[::2]
    vectors = vectors_with(rows, strength=strength)
    scan = scanner_of(vectors, planted=np.zeros(0, dtype=np.int64)).rows(seed=0)
    assert (scan.verdict, scan.in_part) == ("poison suspected", ())
    (block,) = scan.suspected
    assert block.lacking
    assert block.rows[rows].mean() > 0.5
    assert block.agreement == pytest.approx(block.usual_agreement, abs=0.2)


def search_of(vectors: np.ndarray, common: float) -> Search:
    """Rows and clean inputs of class 1 have a part in common; clean inputs of others are not asked.

    Nothing but the class as a whole is looked at, so that no control is replayed.
    """
    last = common * np.eye(vectors.shape[1])[-1]
    given = unit(vectors + (LABELS == 1)[:, None] * last)
    case = case_of(given, [towards(None, 3)], LABELS)
    known = {
        image.contiguous().numpy().tobytes(): unit(towards(None, number) + last)
        for number, image in enumerate(case.controls.images())
    }
    clean = CleanInputs(case.controls, torch.Generator().manual_seed(5))
    return Search(NormalisedInfluence(), case.train, Vectors(given, known), clean)


def test_what_clean_inputs_have_in_common_too_does_not_hide_it() -> None:
    """Nor is one round enough: an eighth of the class, whose cosines with each other are 0.09."""
    search = search_of(vectors_with(LARGE, strength=WEAK), 1.0)
    found = subpopulation(search, 1, np.zeros(SIZE, bool))
    assert found is not None
    assert np.isin(LARGE, found.rows).mean() > 0.7
    assert np.isin(found.rows, LARGE).mean() > 0.95


def test_one_half_of_the_clean_inputs_is_the_metric_and_the_other_the_controls(monkeypatch) -> None:
    metrics, by = [], Whitened.by

    def spied(directions: Vectors, clean: np.ndarray) -> Whitened:
        metrics.append(clean)
        return by(directions, clean)

    search = search_of(vectors_with(LARGE), 0.5)
    monkeypatch.setattr(Whitened, "by", spied)
    found = subpopulation(search, 1, np.zeros(SIZE, bool))
    (half,) = metrics
    every = search.controls(1)
    assert (len(every), len(half), len(found.finding.null)) == (200, 100, 100)
    rest = [vector for vector in every if not (vector == half).all(1).any()]
    starts = by(search.directions.take(found.places), half).towards(np.stack(rest))
    null = Controls(starts, 0.05).null(found.finding.block)
    np.testing.assert_allclose(found.finding.null, null, atol=1e-5)


@pytest.mark.parametrize(("count", "seen"), [(200, True), (199, False)])
def test_a_class_of_fewer_than_two_hundred_rows_is_not_looked_at(count: int, seen: bool) -> None:
    explained = np.cumsum(LABELS == 1) > count
    found = subpopulation(search_of(vectors_with(LARGE), 0.5), 1, explained)
    assert (found is not None) == seen
