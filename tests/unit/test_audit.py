"""The audit's arithmetic: denominators, success, and the list of flagged rows."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from defense.audit import AuditSettings, emptied_classes, flags_csv, incidents, is_success
from defense.evidence import Incident
from defense.metrics import detection_quality, model_quality, ranking
from defense.records import Flags, Split, Truth
from defense.report import ModelQuality, Rate, drop
from defense.storage import blinded

NOTHING = np.zeros(0, np.int64)


def quality(psr: Rate, accuracy: Rate) -> ModelQuality:
    return ModelQuality(
        psr=psr, clean_accuracy=accuracy, robust_accuracy=accuracy, affected_fooled=psr
    )


@pytest.mark.parametrize(
    ("psr", "correct", "success"),
    [(4, 90, True), (5, 90, False), (4, 88, True), (4, 87, False), (None, 90, False)],
)
def test_success_needs_a_measured_psr_below_the_bound(psr, correct, success) -> None:
    before = quality(Rate.of(99, 100), Rate.of(90, 100))
    rate = Rate.of(0, 0) if psr is None else Rate.of(psr, 100)
    after = quality(rate, Rate.of(correct, 100))
    assert is_success(before, after, AuditSettings(accuracy_drop_bound=0.02)) is success


@pytest.mark.parametrize("total", [100, 360])
def test_no_bound_on_the_drop_is_missed_by_rounding(total: int) -> None:
    """Equal losses are the same number, whatever the accuracy before."""
    for correct in range(total // 50, total + 1):
        lost = drop(Rate.of(correct, total), Rate.of(correct - total // 50, total))
        assert lost == (total // 50) / total
    assert drop(Rate.of(1, 2), Rate.of(1, 3)) == pytest.approx(1 / 6)
    assert drop(Rate.of(0, 0), Rate.of(1, 3)) is None


def test_classes_of_which_no_row_is_left_are_named(split: Split) -> None:
    gone = np.isin(split.train.labels, [1, 3])
    everything = np.ones_like(gone)
    flags = Flags(gone.astype(np.float32), 0.5, everything, everything)
    names = split.train.class_names
    assert emptied_classes(split.train, flags) == [names[1], names[3]]
    gone[np.flatnonzero(gone)[0]] = False
    flags = Flags(gone.astype(np.float32), 0.5, everything, everything)
    assert len(emptied_classes(split.train, flags)) == 1


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_rows_outside_are_ranked_last_whatever_the_unit(scale: float) -> None:
    suspicion = np.array([3, -2, -2, 5], dtype=np.float32) * np.float32(scale)
    everything = np.ones(4, dtype=bool)
    flags = Flags(suspicion, 0.0, everything, everything)
    assert ranking(flags, everything).tolist() == [2, 1, 1, 3]
    assert ranking(flags, np.array([True, True, False, False])).tolist() == [2, 1, 0, 0]


def test_affected_inputs_are_not_trials_of_the_success_rate(split: Split) -> None:
    test = split.test.where(np.arange(len(split.test)) < 8)
    probe = replace(test, labels=np.full(8, 1))
    truth = Truth(
        np.zeros(3, dtype=bool), np.zeros(3, dtype=np.int64), 1, test.labels, np.zeros(8, bool)
    )
    predicted = np.array([1, 1, 1, 0, 1, 2, 3, 1])
    measured = model_quality(
        test.labels, predicted, test, probe, truth, test.ids[:2], predicted[:2] == 1
    )
    assert (measured.psr.successes, measured.psr.total) == (3, 6)
    assert (measured.affected_fooled.successes, measured.affected_fooled.total) == (2, 2)
    natural = (test.labels[2:] == 1).sum()  # the model says of all clean images what they are
    assert (measured.without_trigger.successes, measured.without_trigger.total) == (natural, 6)
    assert measured.clean_accuracy.value == 1
    right = predicted[2:] == test.labels[2:]
    assert (measured.robust_accuracy.successes, measured.robust_accuracy.total) == (right.sum(), 6)


def test_an_attack_on_one_image_is_judged_by_that_image(split: Split) -> None:
    """Witches' Brew: the affected input is all there is, and no test image of its own."""
    test = split.test.where(np.arange(len(split.test)) < 8)
    probe = replace(test.where(np.arange(8) == 2), labels=np.array([1]))
    victims = np.arange(8) == 2
    truth = Truth(np.zeros(3, bool), np.zeros(3, np.int64), 1, test.labels[victims], victims)
    said = test.labels.copy()
    said[2] = 1
    measured = model_quality(said, np.array([1]), test, probe, truth, probe.ids, probe.labels == 1)
    assert (measured.psr.successes, measured.psr.total) == (1, 1)
    assert (measured.clean_accuracy.successes, measured.clean_accuracy.total) == (7, 7)
    assert measured.without_trigger.value is None  # it is attacked without a trigger
    assert measured.robust_accuracy.value == 0


def test_detection_counts_against_the_truth() -> None:
    poisoned = np.array([1, 1, 0, 0, 1, 0], dtype=bool)
    suspicion = np.array([9, 8, 7, 1, 0, 9], dtype=np.float32)
    predicted = np.array([1, 1, 1, 1, 1, 0], dtype=bool)
    flags = Flags(suspicion, 5.0, predicted, predicted)
    truth = Truth(poisoned, np.zeros(6, np.int64), 1, NOTHING, NOTHING.astype(bool))
    restricted, everywhere = detection_quality(flags, truth)
    assert (restricted.tpr.successes, restricted.tpr.total) == (2, 3)
    assert (restricted.precision.successes, restricted.precision.total) == (2, 3)
    assert (everywhere.precision.successes, everywhere.precision.total) == (2, 4)
    # ranks 9 8 7 1 0 of the restricted rows: hits at places 1, 2 and 5
    assert restricted.average_precision == pytest.approx((1 + 1 + 3 / 5) / 3)


def test_incidents_are_told_by_the_names_of_classes_and_inputs(split: Split) -> None:
    flags = Flags(np.zeros(2, np.float32), 0.0, np.ones(2, bool), np.ones(2, bool))
    told = Incident((1,), 2, 0.01, 100, 40, 0.05, (1.0, 0.0, 4.0), 0.5, (0.5, 3.0, 1.0, 0.1), 1)
    hit = blinded(split.test).ids[[4, 7]].tolist()
    silent = replace(told, rival=None, untold=True, alike=tuple(hit))
    exhibits = SimpleNamespace(
        test=split.test,
        affected=split.test.take(np.arange(2)),
        train=split.train,
        flags=replace(flags, incidents=(told, silent)),
    )
    first, second = incidents(exhibits)
    names = split.train.class_names
    assert (first.label, first.rival, second.rival) == (names[2], names[1], None)
    assert (first.untold, second.untold) == (False, True)
    assert first.affected == [split.test.ids[1]]
    assert (first.alike, second.alike) == ([], split.test.ids[[4, 7]].tolist())
    assert list(first.enrichment) == [names[1], names[2], names[0], names[3]]
    assert first.precision == (0.975, 0.9, 1.0)
    assert (first.num_flagged, first.num_controls, first.p_value_left) == (40, 100, 0.5)


def test_nothing_flagged_has_no_precision() -> None:
    nothing = Flags(np.zeros(2, dtype=np.float32), 1.0, np.ones(2, bool), np.ones(2, bool))
    truth = Truth(np.array([True, False]), np.zeros(2, np.int64), 1, NOTHING, NOTHING.astype(bool))
    quality, _ = detection_quality(nothing, truth)
    assert quality.precision.value is None
    assert quality.tpr.value == 0
    assert nothing.verdict == "nothing found"


@pytest.mark.parametrize("formula", ["=1+1", "+1", "-1", "@A1", "\t=1+1"])
def test_flagged_rows_are_listed_by_suspicion_and_cannot_be_formulas(
    split: Split, formula: str
) -> None:
    train = replace(split.train, class_names=(formula, "b", "c", "d"))
    suspicion = np.zeros(len(train), dtype=np.float32)
    suspicion[[4, 9, 2]] = [3, 5, 4]
    flags = Flags(suspicion, 1.0, np.ones(len(train), bool), np.ones(len(train), bool))
    lines = flags_csv(train, flags).splitlines()
    assert lines[0] == "row,id,label,suspicion,p_value"
    assert [line.split(",")[0] for line in lines[1:]] == ["9", "2", "4"]
    assert lines[3] == f"4,s1/0004,'{formula},3,"
    judged = replace(flags, p_values=np.where(suspicion == 3, 0.0125, np.nan))
    assert flags_csv(train, judged).splitlines()[3] == f"4,s1/0004,'{formula},3,0.0125"
