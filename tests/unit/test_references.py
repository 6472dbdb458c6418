"""What measures by the truth: reference flags, counterfactuals, and drawing affected inputs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from defense.compute import seeded
from defense.errors import DataError
from defense.records import Flags, Split, Truth
from defense.storage import blinded
from pipelines.params import AffectedSettings
from pipelines.stages.counterfactual import counterfactuals
from pipelines.stages.reference import flagged
from pipelines.stages.train import choose_affected

NOTHING = np.zeros(0, np.int64)
POISONED = np.array([1, 1, 1, 0, 0, 0, 0, 0], dtype=bool)
LABELS = np.array([2, 2, 2, 2, 2, 2, 1, 0])
TRUTH = Truth(POISONED, LABELS, 2, NOTHING, NOTHING.astype(bool))


def flags_of(suspicion) -> Flags:
    """Flag the rows above one half."""
    return Flags(np.array(suspicion, np.float32), 0.5, LABELS == 2, LABELS == 2)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_reference_flags_are_the_poison_as_many_clean_rows_or_none() -> None:
    np.testing.assert_array_equal(flagged("truth", TRUTH, generator()), POISONED)
    chance = flagged("chance", TRUTH, generator())
    assert chance.sum() == 3
    assert not (chance & POISONED).any()
    assert not flagged("nothing", TRUTH, generator()).any()


def test_counterfactuals_are_the_sets_they_are_called() -> None:
    sets = counterfactuals(flags_of([0.9, 0.8, 0.1, 0.7, 0, 0, 0, 0.6]), TRUTH, LABELS, generator())
    assert not sets["nothing"].any()
    np.testing.assert_array_equal(np.flatnonzero(sets["found"]), [0, 1])
    np.testing.assert_array_equal(np.flatnonzero(sets["missed"]), [2])
    assert sets["any_poison"].sum() == 2
    assert not (sets["any_poison"] & ~POISONED).any()
    assert sets["clean"].sum() == 2
    assert set(np.flatnonzero(sets["clean"])) <= {3, 4, 5}
    assert len(sets) == 6


def test_a_third_of_the_flags_are_the_most_suspicious_ones() -> None:
    suspicion = [0.6, 0.9, 0.7, 0.8, 0.65, 0.95, 1, 1]  # the last two are no candidates
    sets = counterfactuals(flags_of(suspicion), TRUTH, LABELS, generator())
    np.testing.assert_array_equal(np.flatnonzero(sets["third"]), [1, 5])


def test_counterfactuals_leave_out_what_is_empty_and_tell_what_is_short() -> None:
    nothing = flags_of(np.zeros(8))
    assert list(counterfactuals(nothing, TRUTH, LABELS, generator())) == ["nothing", "missed"]
    few = np.where(LABELS == 2, 2, 0)
    few[4:] = 0  # one clean row is left in the target class
    with pytest.warns(UserWarning, match="has 1 clean rows, fewer than the 3 poisoned ones"):
        sets = counterfactuals(flags_of(POISONED), TRUTH, few, generator())
    assert "missed" not in sets
    np.testing.assert_array_equal(np.flatnonzero(sets["clean"]), [3])


def test_affected_inputs_succeed_unless_others_may_fill_up(split: Split) -> None:
    probe = replace(split.test, labels=np.ones(len(split.test), dtype=np.int64))
    predicted = np.zeros(len(probe), dtype=np.int64)
    predicted[[5, 9, 30]] = 1
    chosen = choose_affected(probe, predicted, AffectedSettings(count=2), generator())
    assert set(chosen.ids) <= set(probe.ids[[5, 9, 30]])
    firsts = {
        choose_affected(probe, predicted, AffectedSettings(count=3), seeded(seed, "draw")).ids[0]
        for seed in range(20)
    }
    assert firsts == set(probe.ids[[5, 9, 30]])  # no favourite among them
    with pytest.raises(DataError, match="count is 4, but only 3 of 80"):
        choose_affected(probe, predicted, AffectedSettings(count=4), generator())
    filled = choose_affected(probe, predicted, AffectedSettings(count=4, fill=True), generator())
    assert set(probe.ids[[5, 9, 30]]) < set(filled.ids)
    assert len(filled) == 4


def test_methods_do_not_see_file_names(split: Split) -> None:
    hidden = blinded(split.train)
    assert len(set(hidden.ids)) == len(hidden)
    assert not set(hidden.ids) & set(split.train.ids)
    np.testing.assert_array_equal(hidden.ids, blinded(split.train).ids)
