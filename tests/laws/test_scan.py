"""What a scan promises: it finds planted blocks, tells natural ones apart, and alarms rarely."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from defense.detectors.search import CleanInputs
from defense.detectors.subpopulation import Subpopulation
from defense.evidence import Scan
from defense.independent import Agreement
from defense.records import ImageSet
from defense.scan import Scanner, ScanSettings
from defense.storage import load_scan, save_scan
from tests.conftest import make_images
from tests.laws.blocks import SIZE, towards, vectors_with
from tests.laws.test_detectors import Vectors, unit

LABELS = np.arange(SIZE) % 4
BLOCK = np.flatnonzero(LABELS == 1)[:40]
OTHER = np.flatnonzero(LABELS == 2)[5:23]  # less than a twentieth of its class


def scanner_of(
    vectors: np.ndarray,
    *,
    planted: np.ndarray = BLOCK,
    known: dict[bytes, np.ndarray] | None = None,
    skill: float = 0.7,
    learns_in: int = 1,
    labels: np.ndarray = LABELS,
    **options: float,
) -> Scanner:
    """A scanner whose independent model knows a share of labels, and gives planted rows a 3."""
    train = make_images(SIZE, seed=8)
    train = ImageSet(train.pixels, labels, *list(vars(train).values())[2:])
    said = np.where(np.random.default_rng(2).random(SIZE) < skill, labels, (labels + 1) % 4)
    said[planted] = 3
    answers = dict(zip(train.ids.tolist(), said.tolist(), strict=True))
    seen, trained = list[str](), list[int]()

    def independent(rows: ImageSet, epochs: int) -> Callable[[ImageSet], np.ndarray]:
        seen.extend(rows.ids.tolist())
        trained.append(epochs)
        if epochs < learns_in:
            return lambda images: np.zeros(len(images), dtype=np.int64)
        return lambda images: np.array([answers[name] for name in images.ids])

    clean = CleanInputs(make_images(800, seed=8), torch.Generator().manual_seed(0))
    scanner = Scanner(
        ScanSettings(**options), train, Vectors(vectors, known or {}), clean, independent
    )
    scanner.seen, scanner.trained = seen, trained
    return scanner


def rows_of(scan: Scan) -> list[tuple[int, bool]]:
    return [(block.label, block.suspected) for block in scan.blocks]


def test_finds_a_planted_block_and_tells_a_natural_one_apart() -> None:
    scanner = scanner_of(vectors_with(BLOCK, OTHER))
    scan = scanner.rows(seed=0)
    assert scan.verdict == "poison suspected"
    assert sorted(rows_of(scan)) == [(1, True), (2, False)]
    planted = next(block for block in scan.blocks if block.suspected)
    natural = next(block for block in scan.blocks if not block.suspected)
    assert planted.rows[BLOCK].mean() > 0.95
    assert natural.rows[OTHER].mean() > 0.95
    assert np.isin(np.flatnonzero(planted.rows), BLOCK).mean() > 0.95
    assert planted.said == 3
    assert planted.agreement < 0.1 < planted.usual_agreement
    assert planted.coherence > planted.clean_coherence
    assert natural.agreement == pytest.approx(natural.usual_agreement, abs=0.2)


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


def test_a_class_without_clean_inputs_is_named_and_the_others_are_scanned() -> None:
    scanner = scanner_of(vectors_with(BLOCK))
    mixed = scanner.search.clean.mixed
    scanner.search.clean.mixed = mixed.where(mixed.labels != 2)
    scan = scanner.rows(seed=0)
    assert scan.unchecked == (2,)
    assert replace(scan, blocks=()).verdict == "not measured"
    assert [block.label for block in scan.suspected] == [1]


def test_half_of_a_small_class_is_left_to_learn_from() -> None:
    scanner = scanner_of(vectors_with(BLOCK), held_out=10_000)
    (block,) = scanner.rows(seed=0).suspected
    rest = (scanner.train.labels == 1).sum() - block.rows.sum()
    assert block.num_held_out == rest // 2


def test_a_class_with_few_rows_is_not_looked_at() -> None:
    scanner = scanner_of(vectors_with(BLOCK), smallest=501)  # rows of each class: 500
    assert scanner.rows(seed=0).unchecked == (0, 1, 2, 3)


def test_without_blocks_nothing_is_trained_and_nothing_suspected() -> None:
    scanner = scanner_of(vectors_with())
    scan = scanner.rows(seed=0)
    assert (scan.verdict, scan.blocks) == ("nothing suspected", ())
    assert not scanner.seen


def test_two_attacks_on_one_class_are_two_blocks() -> None:
    both = np.flatnonzero(LABELS == 1)[:40], np.flatnonzero(LABELS == 1)[50:110]
    scan = scanner_of(vectors_with(*both), planted=np.concatenate(both)).rows(seed=0)
    assert len(scan.suspected) == 2
    shares = sorted(tuple(block.rows[part].mean() > 0.9 for part in both) for block in scan.blocks)
    assert shares == [(False, True), (True, False)]


def test_an_attack_is_not_hidden_by_a_denser_one() -> None:
    """All rows of the denser one come first, more of them than there are tries."""
    dense, other = np.flatnonzero(LABELS == 1)[:60], np.flatnonzero(LABELS == 1)[60:100]
    vectors = vectors_with(dense, other, strength=9.0)
    vectors[dense] = vectors_with(dense, strength=30.0)[dense]
    scan = scanner_of(vectors, planted=np.concatenate([dense, other]), attempts=1).rows(seed=0)
    assert [block.rows[dense].mean() > 0.9 for block in scan.blocks] == [True]
    scan = scanner_of(vectors, planted=np.concatenate([dense, other])).rows(seed=0)
    assert [block.rows[other].mean() > 0.9 for block in scan.suspected] == [False, True]


def test_a_class_whose_inputs_are_all_alike_has_no_block() -> None:
    """Rows cohere, but so do clean inputs: nothing stands out."""
    vectors = vectors_with(np.flatnonzero(LABELS == 0))
    images = make_images(800, seed=8)
    alike = {
        image.contiguous().numpy().tobytes(): towards(0, number)
        for number, (image, label) in enumerate(
            zip(images.images(), images.labels.tolist(), strict=True)
        )
        if label == 0
    }
    assert not scanner_of(vectors, known=alike).rows(seed=0).blocks


def test_an_untriggered_input_that_a_block_dictates_gives_it_away() -> None:
    inputs = make_images(60, seed=31)
    images = inputs.images()
    known = {images[7].contiguous().numpy().tobytes(): towards(0, 5, 6.0)}
    scan = scanner_of(vectors_with(BLOCK), known=known).inputs(inputs, np.full(60, 1), seed=0)
    (block,) = scan.suspected
    assert block.rows[BLOCK].mean() > 0.95
    (first,) = [given for given in scan.inputs if given.dictated]
    assert (first.id, first.place) == (inputs.ids[7], 7)
    assert first.p_value <= 0.02
    assert scan.inputs[0] is first
    assert len(scan.inputs) == 20


def test_inputs_without_a_block_give_nothing_away() -> None:
    inputs = make_images(60, seed=31)
    scan = scanner_of(vectors_with()).inputs(inputs, np.arange(60) % 4, seed=0)
    assert (scan.verdict, scan.inputs) == ("nothing suspected", ())


def test_a_block_that_no_input_points_to_is_found_all_the_same() -> None:
    inputs = make_images(60, seed=31)
    scan = scanner_of(vectors_with(BLOCK)).inputs(inputs, np.arange(60) % 4, seed=0)
    assert rows_of(scan) == [(1, True)]
    assert scan.inputs
    assert not any(given.dictated for given in scan.inputs)


def test_candidates_bound_the_work_and_still_find_a_block() -> None:
    block = np.flatnonzero(LABELS == 1)[::4]  # a quarter of its class
    scan = scanner_of(vectors_with(block), planted=block, candidates=60).rows(seed=0)
    (found,) = scan.suspected
    assert found.rows[block].mean() > 0.95


def test_a_scan_reads_back(tmp_path: Path) -> None:
    inputs = make_images(60, seed=31)
    known = {inputs.images()[7].contiguous().numpy().tobytes(): unit(towards(0, 5))}
    for scan in (
        scanner_of(vectors_with()).rows(seed=0),
        scanner_of(vectors_with(BLOCK), known=known).inputs(inputs, np.full(60, 1), seed=0),
    ):
        save_scan(tmp_path / "scan", scan)
        back = load_scan(tmp_path / "scan")[0]
        assert (back.inputs, back.alarm, back.verdict) == (scan.inputs, scan.alarm, scan.verdict)
        for one, other in zip(back.blocks, scan.blocks, strict=True):
            np.testing.assert_array_equal(one.rows, other.rows)
            assert {**vars(one), "rows": 0} == {**vars(other), "rows": 0}


def known_inputs(images: ImageSet, axis: int, wanted: np.ndarray, strength: float = 12.0) -> dict:
    """Directions of some images, which have a part in common."""
    return {
        image.contiguous().numpy().tobytes(): towards(axis, 500 + number, strength)
        for number, image in enumerate(images.images())
        if wanted[number]
    }


def test_what_clean_inputs_have_too_is_no_place_to_look_at() -> None:
    """Rows that cohere more than poison does, but so do some clean inputs."""
    natural = np.flatnonzero(LABELS == 1)[100:160]
    vectors = vectors_with(BLOCK)
    vectors[natural] = vectors_with(BLOCK[:0], natural, strength=20.0)[natural]
    images = make_images(800, seed=8)
    known = known_inputs(images, 1, (images.labels == 1) & (np.arange(800) % 5 < 3), 20.0)
    scan = scanner_of(vectors, known=known, attempts=1, subpopulation=None).rows(seed=0)
    (block,) = scan.suspected
    assert block.rows[BLOCK].mean() > 0.95


def test_a_place_that_led_to_nothing_is_not_looked_at_again() -> None:
    """A few rows are alike, more than any clean input is, but clean inputs are on the way there."""
    alike = np.flatnonzero(LABELS == 1)[100:120]
    vectors = vectors_with(BLOCK)
    vectors[alike] = vectors_with(BLOCK[:0], alike, strength=60.0)[alike]
    images = make_images(800, seed=8)
    some = np.flatnonzero(images.labels == 1)[::5]
    known = {}
    for number, strength in zip(some, np.linspace(3, 14, len(some)), strict=True):
        known |= known_inputs(images, 1, np.arange(800) == number, strength)
    scan = scanner_of(vectors, known=known, attempts=1, subpopulation=None).rows(seed=0)
    assert not scan.blocks
    scan = scanner_of(vectors, known=known, attempts=2, subpopulation=None).rows(seed=0)
    assert [block.rows[BLOCK].mean() > 0.95 for block in scan.blocks] == [True]


def test_places_that_inputs_point_to_are_looked_at_first() -> None:
    """The only row that is looked at besides is none of the block."""
    inputs, few = make_images(60, seed=31), BLOCK[:18]
    known = {inputs.images()[7].contiguous().numpy().tobytes(): towards(0, 5, 9.0)}
    options = {"candidates": 1, "attempts": 1, "known": known, "subpopulation": None}
    assert not scanner_of(vectors_with(few), **options).rows(seed=0).blocks
    scan = scanner_of(vectors_with(few), **options).inputs(inputs, np.full(60, 1), seed=0)
    assert [block.rows[few].mean() > 0.95 for block in scan.suspected] == [True]


def test_all_inputs_that_a_block_dictates_are_listed() -> None:
    inputs = make_images(60, seed=31)
    known = known_inputs(inputs, 0, np.arange(60) < 30)
    scan = scanner_of(vectors_with(BLOCK), known=known).inputs(inputs, np.full(60, 1), seed=0)
    assert {*range(30)} <= {given.place for given in scan.inputs if given.dictated}


def test_classes_of_inputs_that_are_not_looked_at_are_named() -> None:
    inputs = make_images(60, seed=31)
    scanner = scanner_of(vectors_with())
    mixed = scanner.search.clean.mixed
    scanner.search.clean.mixed = mixed.where(mixed.labels != 2)
    assert scanner.inputs(inputs, np.arange(60) % 3, seed=0).unchecked == (2,)
    scan = scanner_of(vectors_with(), num_controls=199).inputs(inputs, np.arange(60) % 3, seed=0)
    assert (scan.in_part, scan.verdict) == ((0, 1, 2), "nothing suspected")


def test_a_class_of_fewer_than_twenty_rows_is_not_looked_at() -> None:
    for count, unchecked in ((19, (1,)), (20, ())):
        labels = np.where((LABELS != 1) | (np.arange(SIZE) < 4 * count), LABELS, 0)
        assert scanner_of(vectors_with(), labels=labels).rows(seed=0).unchecked == unchecked


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
    assert agreement((27, 100), (50, 100)).p_value(27) < 0.001
    assert not agreement((4, 16), (50, 100)).contradicted(0.01)  # this may be chance
    assert agreement((4, 16), (50, 100)).telling(0.01)
    assert agreement((4, 16), (50, 100)).contradicted(1e-9)  # nothing could tell
    assert agreement((20, 20), (50, 100)).p_value(20) == pytest.approx(1)


@pytest.mark.parametrize(("more", "lacking"), [(20, [True]), (80, [False, True])])
def test_what_a_block_holds_little_of_is_told_besides_it(monkeypatch, more: int, lacking) -> None:
    """Rows of a class have something in common, and those of a block are some of them."""
    scanner = scanner_of(vectors_with(BLOCK), planted=BLOCK[:0])
    bench, places = scanner.search.bench(1), np.flatnonzero(LABELS == 1)
    rows = np.r_[BLOCK, places[40 : 40 + more]]
    finding = bench.judge(bench.rows.between(np.array([0]))[0])
    seen = Subpopulation(rows, np.full(SIZE, np.nan, np.float32), finding, bench.null)
    nothing = replace(seen, rows=rows[:0])
    monkeypatch.setattr(
        "defense.scan.subpopulation", lambda _, label, __: seen if label == 1 else nothing
    )
    scan = scanner.rows(seed=0)
    assert [block.lacking for block in scan.blocks] == lacking
    assert [block.suspected for block in scan.blocks] == lacking
    assert scan.blocks[-1].rows.sum() == pytest.approx(40 if more == 20 else 120, abs=2)
