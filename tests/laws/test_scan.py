"""What a scan promises: it finds planted blocks, tells natural ones apart, and alarms rarely."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from defense.detectors.coherence import Rows
from defense.detectors.subpopulation import Subpopulation
from defense.records import ImageSet
from defense.storage import load_scan, save_scan
from tests.conftest import make_images
from tests.laws.blocks import SIZE, towards, vectors_with
from tests.laws.cases import unit
from tests.laws.scanners import BLOCK, LABELS, OTHER, rows_of, scanner_of


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


def test_a_class_without_clean_inputs_is_named_and_the_others_are_scanned() -> None:
    scanner = scanner_of(vectors_with(BLOCK))
    mixed = scanner.search.clean.mixed
    scanner.search.clean.mixed = mixed.where(mixed.labels != 2)
    scan = scanner.rows(seed=0)
    assert scan.unchecked == (2,)
    assert replace(scan, blocks=()).verdict == "not measured"
    assert [block.label for block in scan.suspected] == [1]


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
    assert [block.rows[dense].mean() > 0.9 for block in scan.suspected] == [True, False]
    assert [block.rows[other].mean() > 0.9 for block in scan.suspected] == [False, True]


def test_an_attack_is_not_hidden_by_harmless_blocks() -> None:
    """Somebody plants more near-duplicates with right labels than there are attempts."""
    own = np.flatnonzero(LABELS == 1)
    decoys = [own[60 + 17 * number : 77 + 17 * number] for number in range(5)]
    vectors = vectors_with(BLOCK, *decoys, strength=9.0)
    for decoy in decoys:
        vectors[decoy] = vectors_with(BLOCK, *decoys, strength=20.0)[decoy]
    scan = scanner_of(vectors, attempts=1, subpopulation=None).rows(seed=0)
    assert len(scan.blocks) == 6
    assert [block.rows[BLOCK].mean() > 0.9 for block in scan.suspected] == [True]


def test_a_scan_names_clean_inputs_that_an_attack_reached_if_that_is_asked_for() -> None:
    images = make_images(800, seed=8)
    hit = np.flatnonzero(images.labels == 1)[[3, 50]]
    known = known_inputs(images, 0, np.isin(np.arange(800), hit))
    options = {"known": known, "subpopulation": None}
    scan = scanner_of(vectors_with(BLOCK), **options).rows(seed=0)
    assert [block.alike for block in scan.blocks] == [()]
    scan = scanner_of(vectors_with(BLOCK), **options, contaminated=0.01).rows(seed=0)
    assert [block.rows[BLOCK].mean() > 0.9 for block in scan.suspected] == [True]
    assert {*scan.blocks[0].alike} == {*images.ids[hit].tolist()}


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


@pytest.mark.parametrize(("more", "lacking"), [(20, [True]), (80, [False, True])])
def test_what_a_block_holds_little_of_is_told_besides_it(monkeypatch, more: int, lacking) -> None:
    """Rows of a class have something in common, and those of a block are some of them."""
    scanner = scanner_of(vectors_with(BLOCK), planted=BLOCK[:0])
    bench, places = scanner.search.bench(1), np.flatnonzero(LABELS == 1)
    rows = np.r_[BLOCK, places[40 : 40 + more]]
    finding = bench.judge(bench.rows.between(np.array([0]))[0])
    seen = Subpopulation(rows, places, finding)
    nothing = replace(seen, rows=rows[:0])
    monkeypatch.setattr(
        "defense.scan.subpopulation", lambda _, label, __: seen if label == 1 else nothing
    )
    scan = scanner.rows(seed=0)
    assert [block.lacking for block in scan.blocks] == lacking
    assert [block.suspected for block in scan.blocks] == lacking
    assert scan.blocks[-1].rows.sum() == pytest.approx(40 if more == 20 else 120, abs=2)


@pytest.mark.parametrize("with_inputs", [True, False])
def test_one_class_is_in_memory_at_a_time(monkeypatch, *, with_inputs: bool) -> None:
    scanner, most = scanner_of(vectors_with(BLOCK, OTHER)), [0, 0]
    search, between = scanner.search, Rows.between

    def watched(rows: Rows, places: np.ndarray) -> np.ndarray:
        most[:] = max(most[0], len(search.benches)), max(most[1], len(search.known))
        return between(rows, places)

    monkeypatch.setattr(Rows, "between", watched)
    images = make_images(40, seed=21)
    scan = scanner.inputs(images, images.labels, 0) if with_inputs else scanner.rows(seed=0)
    assert {block.label for block in scan.blocks} == {1, 2}
    assert most == [1, 1]
    assert not search.benches
    assert not search.known
