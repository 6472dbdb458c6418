"""How a scan judges its blocks: by an independent model that has seen none of their rows."""

import numpy as np
import pytest

from defense.independent import Agreement
from defense.scan import ScanSettings
from tests.laws.blocks import SIZE, vectors_with
from tests.laws.scanners import BLOCK, LABELS, OTHER, rows_of, scanner_of


def test_the_independent_model_never_sees_a_block_nor_what_it_is_compared_with() -> None:
    scanner = scanner_of(vectors_with(BLOCK))
    scan = scanner.rows(seed=0)
    (block,) = scan.blocks
    unseen = set(scanner.train.ids.tolist()) - set(scanner.seen)
    assert set(scanner.train.ids[block.rows].tolist()) <= unseen
    assert len(unseen) == block.rows.sum() + block.num_held_out
    assert block.num_held_out == scanner.settings.held_out


def test_an_independent_model_that_knows_too_little_is_trained_for_longer() -> None:
    scanner = scanner_of(vectors_with(OTHER), planted=OTHER[:0], learns_in=4)
    (block,) = scanner.rows(seed=0).blocks
    assert not block.suspected
    assert scanner.trained == [1, 4]


def test_a_block_that_nobody_can_vouch_for_is_suspected() -> None:
    scanner = scanner_of(vectors_with(OTHER), planted=OTHER[:0], learns_in=100)
    (block,) = scanner.rows(seed=0).blocks
    assert block.suspected
    assert block.usual_agreement == 0
    assert scanner.trained == [1, 4, 16]


def test_what_a_model_learns_of_a_small_class_is_repeated() -> None:
    labels = np.where((LABELS != 1) | (np.arange(SIZE) < 400), LABELS, 0)
    scanner = scanner_of(vectors_with(BLOCK), labels=labels)
    (block,) = scanner.rows(seed=0).suspected
    names = scanner.train.ids[(labels == 1) & ~block.rows]
    learnt = [name for name in scanner.seen if name in set(names.tolist())]
    unseen = block.rows.sum() + block.num_held_out
    assert len(set(learnt)) == len(names) - block.num_held_out
    assert len(learnt) == (SIZE - unseen) // 4
    assert len(scanner.seen) - len(learnt) == (labels != 1).sum()


def test_where_no_test_could_tell_the_share_decides() -> None:
    """Ten rows to compare with cannot bring a p-value of 1e-12, however long the training."""
    scanner = scanner_of(vectors_with(BLOCK, OTHER), held_out=10, alarm=1e-12)
    scan = scanner.rows(seed=0)
    assert sorted(rows_of(scan)) == [(1, True), (2, False)]
    assert min(block.p_value for block in scan.suspected) > scan.alarm
    assert scanner.trained == [1, 4, 16]


def test_half_of_a_small_class_is_left_to_learn_from() -> None:
    scanner = scanner_of(vectors_with(BLOCK), held_out=10_000)
    (block,) = scanner.rows(seed=0).suspected
    rest = (scanner.train.labels == 1).sum() - block.rows.sum()
    assert block.num_held_out == rest // 2


def test_a_class_that_is_a_block_as_a_whole_is_suspected_without_longer_training() -> None:
    labels = np.where((LABELS != 1) | np.isin(np.arange(SIZE), BLOCK), LABELS, 0)
    scanner = scanner_of(vectors_with(BLOCK), labels=labels)
    (block,) = scanner.rows(seed=0).suspected
    assert (block.rows.sum(), block.num_held_out) == (len(BLOCK), 0)
    assert scanner.trained == [1]


def test_nothing_is_repeated_of_a_class_with_half_of_an_even_share() -> None:
    scanner = scanner_of(vectors_with(BLOCK))  # 360 of 1,860 rows are left of it
    scanner.rows(seed=0)
    assert len(scanner.seen) == len({*scanner.seen})


def test_no_more_rows_are_learnt_from_than_asked_for() -> None:
    scanner = scanner_of(vectors_with(BLOCK), max_rows=1000)
    assert scanner.rows(seed=0).suspected
    assert len(scanner.seen) == 1000


def test_more_rows_are_learnt_from_before_they_are_repeated() -> None:
    settings = ScanSettings(max_rows=1000)
    assert [*settings.efforts(900)] == [(900, 1), (900, 4), (900, 16)]
    assert [*settings.efforts(2000)] == [(1000, 1), (2000, 2), (2000, 8)]
    assert [*settings.efforts(20_000)] == [(1000, 1), (4000, 1), (16_000, 1)]
    twice = ScanSettings(max_rows=1000, epochs=2, max_epochs=10)
    assert [*twice.efforts(8000)] == [(1000, 2), (4000, 2), (5000, 2)]
    assert [*ScanSettings(max_rows=None, max_epochs=1).efforts(50)] == [(50, 1)]
    scanner = scanner_of(vectors_with(BLOCK), max_rows=1000, learns_in=8)
    assert scanner.rows(seed=0).suspected
    assert scanner.trained == [1, 2, 9]
    left = SIZE - len(BLOCK) - 100
    assert len(scanner.seen) == 1000 + 2 * left


def test_the_alarm_is_for_all_blocks_together() -> None:
    """A quarter of the labels of one of two blocks is right."""
    options = {"planted": BLOCK[:30], "subpopulation": None}
    vectors = vectors_with(BLOCK, OTHER)
    blocks = scanner_of(vectors, **options).rows(seed=0).blocks
    (planted,) = [block for block in blocks if block.label == 1]
    assert len(blocks) == 2
    assert planted.suspected
    assert 0 < planted.agreement < 0.5 * planted.usual_agreement
    assert planted.said_share == pytest.approx(30 / 40, abs=0.1)
    for factor, suspected in ((1.9, False), (2.1, True)):
        scanner = scanner_of(vectors, alarm=factor * planted.p_value, **options)
        (planted,) = [block for block in scanner.rows(seed=0).blocks if block.label == 1]
        assert planted.suspected == suspected


def test_wrong_labels_among_right_ones_are_unclear() -> None:
    """Somebody adds triggered rows with right labels to a block, so that most of it is right."""
    mixed = BLOCK[:17]
    scan = scanner_of(vectors_with(BLOCK), planted=mixed, skill=0.95, subpopulation=None).rows(0)
    assert [block.judged for block in scan.blocks] == ["unclear"]
    assert scan.blocks[0].agreement > 0.5 * scan.blocks[0].usual_agreement
    assert (scan.verdict, scan.suspected) == ("unclear", ())
    own = np.flatnonzero(LABELS == 1)
    decoys = [own[60 + 17 * number : 77 + 17 * number] for number in range(15)]
    scan = scanner_of(
        vectors_with(BLOCK, *decoys), planted=mixed, skill=0.95, subpopulation=None
    ).rows(0)  # harmless blocks beside it change nothing
    assert [block.judged for block in scan.blocks if block.rows[BLOCK].any()] == ["unclear"]
    assert len(scan.blocks) > 10
    scan = scanner_of(vectors_with(BLOCK), planted=mixed, skill=0.95, subpopulation=0.05).rows(0)
    assert scan.verdict == "poison suspected"  # by what clean inputs of the class lack


def agreement(own: tuple[int, int], usual: tuple[int, int], chance: float = 0.1) -> Agreement:
    parts = (np.arange(total) < agreeing for agreeing, total in (own, usual))
    return Agreement(*parts, chance)


def test_a_model_knows_a_class_by_twice_as_much_as_chance_or_half_way() -> None:
    assert not agreement((9, 20), (19, 100)).knows
    assert agreement((9, 20), (20, 100)).knows
    assert not agreement((9, 20), (74, 100), chance=0.5).knows  # of two classes
    assert agreement((9, 20), (75, 100), chance=0.5).knows
    assert agreement((20, 20), (19, 100)).contradicted(0.01)  # for it cannot vouch for them


def test_labels_are_contradicted_by_few_enough_and_by_the_test() -> None:
    assert agreement((3, 20), (50, 100)).contradicted(0.01)
    assert not agreement((27, 100), (50, 100)).contradicted(0.01)  # more than half as many
    assert agreement((27, 100), (50, 100)).unclear(0.01)
    assert not agreement((27, 100), (50, 100)).unclear(0.0005)
    assert not agreement((4, 16), (50, 100)).unclear(0.01)
    assert agreement((27, 100), (50, 100)).p_value(27) < 0.001
    assert not agreement((4, 16), (50, 100)).contradicted(0.01)  # this may be chance
    assert agreement((4, 16), (50, 100)).telling(0.01)
    assert agreement((4, 16), (50, 100)).contradicted(1e-9)  # nothing could tell
    assert agreement((20, 20), (50, 100)).p_value(20) == pytest.approx(1)
