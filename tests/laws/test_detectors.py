"""Laws of every detector."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn

from defense.contracts import Detector
from defense.detectors import AnyDetector
from defense.detectors.delta_influence import DeltaInfluence
from defense.errors import DataError
from defense.method import members
from defense.records import Case, Queries
from tests.conftest import make_images


def make_case(*, affected: int = 1, transforms: int = 9, rows: int = 40) -> Case:
    """Random scores; every second row of the predicted label stands out."""
    rng = np.random.default_rng(3)
    train = make_images(rows, seed=8)
    count = affected * (1 + transforms)
    transform = torch.arange(-1, transforms).repeat(affected)
    labels = torch.where(transform == -1, 1, 2)
    queries = Queries(
        torch.rand(count, 3, 16, 16),
        labels,
        torch.arange(affected).repeat_interleave(1 + transforms),
        transform,
    )
    scores = rng.normal(size=(count, rows)).astype(np.float32)
    planted = (train.labels == 1) & (np.arange(rows) % 8 == 1)
    scores[np.ix_(transform.numpy() == -1, planted)] += 100
    return Case(train, nn.Identity(), queries, scores)


@pytest.fixture(params=members(AnyDetector), ids=lambda method: method.__name__)
def detector(request) -> Detector:
    return request.param()


def test_cannot_see_the_truth() -> None:
    assert {field.name for field in fields(Case)} == {"train", "model", "queries", "scores"}


@pytest.mark.parametrize("affected", [1, 5])
def test_answers_for_every_row(detector: Detector, affected: int) -> None:
    case = make_case(affected=affected)
    flags = detector.detect(case)
    assert flags.suspicion.shape == flags.mask.shape == flags.predicted_label.shape == (40,)
    assert flags.suspicion.dtype == np.float32
    assert np.isfinite(flags.suspicion).all()
    np.testing.assert_array_equal(flags.predicted_label, case.train.labels == 1)


def test_flags_what_stands_out(detector: Detector) -> None:
    case = make_case()
    flags = detector.detect(case)
    planted = case.scores[0] > 50
    assert planted.sum() == 5
    assert flags.mask[planted].all()
    assert flags.suspicion[planted].min() > flags.suspicion[~planted].max()
    assert flags.verdict == "poison found"


def test_repeats_itself_and_changes_nothing(detector: Detector) -> None:
    case = make_case()
    before = case.scores.copy(), case.train.uint8().copy(), case.train.labels.copy()
    first, second = detector.detect(case), detector.detect(case)
    np.testing.assert_array_equal(first.suspicion, second.suspicion)
    for old, new in zip(before, (case.scores, case.train.uint8(), case.train.labels), strict=True):
        np.testing.assert_array_equal(old, new)


def test_follows_a_permutation_of_the_rows(detector: Detector) -> None:
    case = make_case()
    order = np.random.default_rng(0).permutation(40)
    train = case.train
    moved = replace(train, labels=train.labels[order], ids=train.ids[order], rows=train.rows[order])
    straight = detector.detect(case)
    mixed = detector.detect(replace(case, train=moved, scores=case.scores[:, order]))
    np.testing.assert_array_equal(mixed.suspicion, straight.suspicion[order])
    np.testing.assert_array_equal(mixed.mask, straight.mask[order])


def test_can_be_restricted_to_the_predicted_label(detector: Detector) -> None:
    case = make_case()
    everywhere = detector.detect(case)
    restricted = detector.model_copy(update={"rows": "predicted_label"}).detect(case)
    assert everywhere.candidates.all()
    np.testing.assert_array_equal(restricted.mask, everywhere.mask & (case.train.labels == 1))


@pytest.mark.parametrize("tau", [0.0, -1.0, -100.0])
@pytest.mark.parametrize("tolerance", [0, 1, 3])
def test_delta_influence_is_the_published_count_rule(tau: float, tolerance: int) -> None:
    case = make_case()
    delta = case.scores[1:] - case.scores[0]
    counted = (delta < tau).sum(0) >= len(delta) - tolerance
    flags = DeltaInfluence(tau=tau, tolerance=tolerance).detect(case)
    np.testing.assert_array_equal(flags.mask, counted)


def test_delta_influence_of_several_affected_inputs_intersects() -> None:
    case = make_case(affected=3)
    case.scores[case.queries.affected.numpy() == 2] = 0  # the third implicates no row
    assert DeltaInfluence(tau=-10).detect(case).mask.sum() == 0
    flags = DeltaInfluence(tau=-10, affected_tolerance=1).detect(case)
    np.testing.assert_array_equal(flags.mask, case.scores[0] > 50)
    with pytest.raises(DataError, match="affected_tolerance is 3, expected less than"):
        DeltaInfluence(affected_tolerance=3).detect(case)


def test_delta_influence_refuses_a_tolerance_that_flags_everything() -> None:
    with pytest.raises(DataError, match="expected less than the number of transforms"):
        DeltaInfluence(tolerance=9).detect(make_case(transforms=9))
