"""Laws of every attack."""

import numpy as np
import pytest
import torch

from defense.attacks import AnyAttack
from defense.attacks.badnets import BadNets
from defense.contracts import Attack
from defense.errors import DataError
from defense.method import members
from defense.records import Split


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(params=members(AnyAttack), ids=lambda method: method.__name__)
def attack(request) -> Attack:
    return request.param(target_class="b", victim_class="a", poison_fraction=0.1)


def test_changes_the_planted_rows_and_no_other(attack: Attack, split: Split) -> None:
    before = split.train.uint8().copy()
    planted = attack.poison(split, generator())
    truth = planted.truth
    np.testing.assert_array_equal(split.train.uint8(), before)
    assert truth.poisoned.sum() == 16
    same = (planted.train.uint8() == before).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(same, ~truth.poisoned)
    np.testing.assert_array_equal(planted.train.ids, split.train.ids)
    np.testing.assert_array_equal(truth.original_labels, split.train.labels)
    assert (planted.train.labels[truth.poisoned] == 1).all()
    assert (truth.original_labels[truth.poisoned] == 0).all()
    clean = ~truth.poisoned
    np.testing.assert_array_equal(planted.train.labels[clean], split.train.labels[clean])


def test_probe_holds_triggered_victims_under_the_target_label(attack: Attack, split: Split) -> None:
    planted = attack.poison(split, generator())
    assert (planted.probe.labels == planted.truth.target_class).all()
    assert (planted.truth.probe_labels == 0).all()
    clean = split.test.where(split.test.labels == 0)
    np.testing.assert_array_equal(planted.probe.ids, clean.ids)
    assert (planted.probe.uint8() != clean.uint8()).any(axis=(1, 2, 3)).all()


def test_without_victim_class_attacks_all_but_the_target(attack: Attack, split: Split) -> None:
    planted = attack.model_copy(update={"victim_class": None}).poison(split, generator())
    assert set(planted.truth.probe_labels) == {0, 2, 3}
    assert (planted.truth.original_labels[planted.truth.poisoned] != 1).all()


def test_same_seed_same_poison(attack: Attack, split: Split) -> None:
    first, second = (attack.poison(split, generator()) for _ in range(2))
    np.testing.assert_array_equal(first.train.uint8(), second.train.uint8())
    np.testing.assert_array_equal(first.truth.poisoned, second.truth.poisoned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_class": "zebra"}, "'zebra' does not exist; the classes are: a, b"),
        ({"victim_class": "zebra"}, "'zebra' does not exist"),
        ({"victim_class": "b"}, "both 'b'"),
        ({"poison_fraction": 0.9}, "asks for 144 poisoned rows, expected between 1 and 40"),
        ({"poison_fraction": 0.001}, "asks for 0 poisoned rows"),
    ],
)
def test_refuses(attack: Attack, split: Split, change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        attack.model_copy(update=change).poison(split, generator())


def test_checker_is_the_four_pixels_of_the_published_code() -> None:
    """Rows and columns counted from the lower right corner, set to black in all channels."""
    white = np.full((2, 3, 32, 32), 255, dtype=np.uint8)
    stamped = BadNets(target_class="b").stamp(white)
    changed = {(int(r), int(c)) for r, c in np.argwhere(stamped[0, 0] == 0)}
    assert changed == {(28, 30), (30, 30), (29, 29), (30, 28)}
    np.testing.assert_array_equal(stamped, np.where(stamped[:1, :1] == 0, 0, white))


def test_square_has_its_size_margin_and_value() -> None:
    black = np.zeros((1, 3, 10, 12), dtype=np.uint8)
    attack = BadNets(target_class="b", pattern="square", size=2, margin=3, value=0.6)
    expected = black.copy()
    expected[:, :, 5:7, 7:9] = 153
    np.testing.assert_array_equal(attack.stamp(black), expected)
