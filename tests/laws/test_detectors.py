"""Laws of every detector."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from defense.contracts import Detector
from defense.detectors import AnyDetector
from defense.detectors.activation_clustering import ActivationClustering
from defense.detectors.delta_influence import DeltaInfluence
from defense.detectors.influence_threshold import InfluenceThreshold
from defense.detectors.normalised_influence import NormalisedInfluence
from defense.errors import NumericalError
from defense.method import members
from defense.records import Case
from tests.laws.cases import ROWS, detect, make_case, planted_rows

SHORT = {
    "frequency": {"epochs": 3, "batch_size": 16},
    "poison_forensics": {"min_steps": 8, "batch_size": 16, "rounds": 3},
}


@pytest.fixture(params=members(AnyDetector), ids=lambda method: method.__name__)
def detector(request) -> Detector:
    return request.param(**SHORT.get(request.param.model_fields["name"].default, {}))


def test_cannot_see_the_truth() -> None:
    known = {"train", "model", "queries", "scores", "directions", "controls"}
    assert {field.name for field in fields(Case)} == known


@pytest.mark.parametrize(
    "by_scores", [DeltaInfluence(), InfluenceThreshold(), InfluenceThreshold(share=0.2)]
)
def test_refuses_influence_that_is_not_a_number(by_scores: Detector) -> None:
    """A row of which nothing is known must not pass for one that is not suspicious."""
    case = make_case()
    case.scores[:, 3] = np.nan
    with pytest.raises(NumericalError, match="finite values of influence, got"):
        detect(by_scores, case)


def test_refuses_suspicion_that_is_not_a_number() -> None:
    with pytest.raises(NumericalError, match=f"got 1 of {ROWS} that are not"):
        DeltaInfluence().flags(make_case(), np.where(np.arange(ROWS) == 3, np.inf, 0.0), 0.5)


@pytest.mark.parametrize("affected", [1, 5])
def test_answers_for_every_row(detector: Detector, affected: int) -> None:
    case = make_case(affected=affected)
    flags = detect(detector, case)
    assert flags.suspicion.shape == flags.mask.shape == flags.predicted_label.shape == (ROWS,)
    assert flags.suspicion.dtype == np.float32
    assert np.isfinite(flags.suspicion).all()
    np.testing.assert_array_equal(flags.predicted_label, case.train.labels == 1)


@pytest.mark.parametrize("kind", [DeltaInfluence, InfluenceThreshold, ActivationClustering])
def test_suspects_what_stands_out(kind: type[Detector]) -> None:
    """In the class of the prediction the planted rows come first; score rules flag them alone."""
    case = make_case()
    flags, planted = detect(kind(), case), planted_rows(case.train)
    clean = (case.train.labels == 1) & ~planted
    assert planted.sum() == 6
    assert flags.suspicion[planted].min() > flags.suspicion[clean].max()
    if kind is not ActivationClustering:
        assert flags.mask[planted].all()
        assert flags.verdict == "poison found"


def test_repeats_itself_and_changes_nothing(detector: Detector) -> None:
    case = make_case()
    weights = [value.clone() for value in case.model.parameters()]
    before = case.scores.copy(), case.train.uint8().copy(), case.train.labels.copy()
    first, second = detect(detector, case), detect(detector, case)
    np.testing.assert_array_equal(first.suspicion, second.suspicion)
    for old, new in zip(before, (case.scores, case.train.uint8(), case.train.labels), strict=True):
        np.testing.assert_array_equal(old, new)
    after = case.model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))


def test_follows_a_permutation_of_the_rows(detector: Detector) -> None:
    case = make_case()
    order = np.random.default_rng(0).permutation(ROWS)
    train = case.train
    moved = replace(train, labels=train.labels[order], ids=train.ids[order], rows=train.rows[order])
    straight = detect(detector, case)
    directions = case.directions.take(order)
    mixed = detect(
        detector,
        replace(case, train=moved, scores=case.scores[:, order], directions=directions),
    )
    np.testing.assert_allclose(mixed.suspicion, straight.suspicion[order], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(mixed.mask, straight.mask[order])


def test_can_be_restricted_to_the_predicted_label(detector: Detector) -> None:
    case = make_case()
    everywhere = detect(detector.model_copy(update={"rows": "all"}), case)
    restricted = detect(detector.model_copy(update={"rows": "predicted_label"}), case)
    assert everywhere.candidates.all()
    np.testing.assert_array_equal(restricted.candidates, case.train.labels == 1)
    if not isinstance(detector, NormalisedInfluence):  # which compares with other rows then
        np.testing.assert_array_equal(restricted.mask, everywhere.mask & restricted.candidates)
