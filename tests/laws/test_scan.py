"""What a scan promises: it finds planted blocks, tells natural ones apart, and alarms rarely."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from defense.detectors.search import CleanInputs
from defense.evidence import Scan
from defense.records import ImageSet
from defense.scan import Scanner, ScanSettings
from defense.storage import load_scan, save_scan
from tests.conftest import make_images
from tests.laws.test_detectors import Vectors, unit
from tests.laws.test_normalised_influence import SIZE, towards, vectors_with

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
