"""Attacks on one class, and affected inputs, are told apart by their rows."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from defense.detectors.coherence import COMPONENTS, Block, Rows, separate
from defense.detectors.controls import Controls, Finding, exceedance
from defense.detectors.normalised_influence import together
from tests.laws.blocks import (
    BLOCK,
    LABELS,
    OTHER,
    SIZE,
    WIDTH,
    case_of,
    detect,
    towards,
    vectors_with,
)
from tests.laws.cases import Vectors, unit


def test_tells_two_incidents_apart_and_joins_inputs_of_one() -> None:
    directions = [towards(0, 3), towards(1, 4), towards(0, 5), towards(None, 7)]
    flags = detect(case_of(vectors_with(BLOCK, OTHER), directions, LABELS))
    found = {
        incident.affected: incident.num_flagged for incident in flags.incidents if incident.affected
    }
    assert set(found) == {(0, 2), (1,), (3,)}
    assert found[3,] == 0
    assert flags.mask[BLOCK].mean() > 0.95
    assert flags.mask[OTHER].mean() > 0.95


def test_rows_of_another_attack_are_not_flagged_for_cohering_a_little() -> None:
    vectors = np.random.default_rng(1).normal(size=(SIZE, WIDTH))
    vectors[BLOCK, 0] += 20
    vectors[OTHER, 1] += 20
    vectors[OTHER, 0] += 4.5
    rows = Rows(Vectors(unit(vectors), {}), np.arange(SIZE))
    clean = np.stack([towards(None, seed) for seed in range(100, 700)])
    controls = Controls((clean @ unit(vectors).T).astype(np.float32), 0.05)
    ours, theirs = (
        rows.grow((direction @ unit(vectors).T).astype(np.float32), seeds=16, rounds=5)
        for direction in (
            towards(0, 3, 20.0),
            unit(towards(1, 4, 20.0) + 0.25 * towards(0, 5, 20.0)),
        )
    )
    found = controls.judge(rows, ours, 5)
    np.testing.assert_array_equal(np.flatnonzero(found.flagged), BLOCK)
    p_values = exceedance(controls.null(found.block), found.block.scores)
    assert (false_discovery_control(p_values)[OTHER] <= 0.05).sum() > 5  # though some stand out
    assert set(theirs.seeds) <= set(OTHER)
    standard = controls.standardised(theirs.start)
    assert np.median(standard[ours.seeds]) > 2  # as their input does
    nothing = np.zeros(SIZE, dtype=bool)
    ours, theirs = (replace(found, block=block, flagged=nothing) for block in (ours, theirs))
    assert not controls.are_of_one_incident(ours, theirs)
    assert controls.are_of_one_incident(ours, ours)


def test_an_input_that_leads_to_no_rows_joins_one_incident_and_not_two() -> None:
    rng = np.random.default_rng(0)
    controls = Controls(rng.normal(size=(200, 90)).astype(np.float32), 0.05)
    rows = np.arange(90)

    def finding(start: np.ndarray, flagged: np.ndarray, seeds: np.ndarray) -> Finding:
        block = Block(start.astype(np.float32), start.astype(np.float32), seeds)
        nothing = np.zeros(100, np.float32), np.zeros(0, np.int64)
        return Finding(flagged, block, (0.0, 0.0, 0.0), 0.0, 0.0, *nothing)

    first, second = rows < 30, (rows >= 30) & (rows < 60)
    strong = [
        finding(9.0 * group, group & (rows != left), rows[group])
        for group in (first, second)
        for left in (0, 40)
    ]
    weak = finding(3.0 * first + 4.0 * second, rows < 0, rows[16:44])
    lost = finding(3.0 * (rows >= 60), rows < 0, rows[70:86])
    assert together([weak, *strong, lost], controls) == [[0, 3, 4], [1, 2], [5]]


def shared(axis: int, seed: int | None = None, count: int = 40) -> np.ndarray:
    """Rows, or an input, of one of some attacks that have much in common."""
    rng = np.random.default_rng(axis if seed is None else seed)
    vector = rng.normal(size=(count, WIDTH) if seed is None else WIDTH)
    vector[..., axis] += 20
    vector[..., 2] += 15
    return unit(vector)


def test_attacks_on_one_class_that_have_much_in_common_are_told_apart() -> None:
    vectors = vectors_with()
    other = np.setdiff1d(OTHER, BLOCK)[:40]
    vectors[BLOCK], vectors[other] = shared(0), shared(1)
    case = case_of(vectors, [shared(0, 3), shared(1, 4), shared(0, 5)], LABELS)
    flags = detect(case)
    assert {incident.affected for incident in flags.incidents} == {(0, 2), (1,), ()}
    assert flags.mask[BLOCK].all()
    assert flags.mask[other].all()
    rows = Rows(Vectors(vectors, {}), np.flatnonzero(LABELS == 1))
    clean = np.stack([towards(None, seed) for seed in range(100, 700)])
    controls = Controls((clean @ vectors[rows.places].T).astype(np.float32), 0.05)
    block = rows.grow((shared(0, 3) @ vectors[rows.places].T).astype(np.float32), 16, 5)
    related = controls.discoveries(block)[np.isin(rows.places, other)]
    assert related.mean() > 0.2  # they are not left out by cohering too little
    found = controls.judge(rows, block, 5)
    np.testing.assert_array_equal(rows.places[found.flagged], BLOCK)


@pytest.mark.parametrize(
    "sizes", [(40, 40, 40), (60, 30, 30), (40, 80, 20), (20, 100, 20, 20), (20, 20, 20, 20, 20, 20)]
)
def test_up_to_six_attacks_that_have_much_in_common_are_told_apart(sizes) -> None:
    vectors, axes = vectors_with(), (0, 1, 3, 4, 5, 6)
    parts = np.split(np.flatnonzero(LABELS == 1)[: sum(sizes)], np.cumsum(sizes)[:-1])
    for axis, part in zip(axes, parts, strict=False):
        vectors[part] = shared(axis, None, len(part))
    rows = Rows(Vectors(vectors, {}), np.flatnonzero(LABELS == 1))
    clean = np.stack([towards(None, seed) for seed in range(100, 700)])
    controls = Controls((clean @ vectors[rows.places].T).astype(np.float32), 0.05)
    for axis, part in zip(axes, parts, strict=False):
        start = (shared(axis, 7) @ vectors[rows.places].T).astype(np.float32)
        found = controls.judge(rows, rows.grow(start, 16, 5), 5)
        np.testing.assert_array_equal(rows.places[found.flagged], part)


@pytest.mark.parametrize("seed", range(4))
def test_a_weak_block_of_one_cause_is_left_in_one_piece(seed: int) -> None:
    """Its cosines scatter as much as they are large."""
    rng, size = np.random.default_rng(seed), 150
    scale = np.r_[0.0, np.arange(1, 256) ** -0.3]
    scale /= np.linalg.norm(scale)
    vectors, clean = rng.normal(size=(1500, 256)) * scale, rng.normal(size=(600, 256)) * scale
    vectors[:size, 0] += 0.3 * np.exp(0.5 * rng.normal(size=size))
    affected = rng.normal(size=256) * scale + 0.45 * np.eye(256)[0]
    vectors, clean, affected = unit(vectors), unit(clean), unit(affected)
    rows = Rows(Vectors(vectors, {}), np.arange(1500))
    controls = Controls((clean @ vectors.T).astype(np.float32), 0.05)
    block = rows.grow((affected @ vectors.T).astype(np.float32), 16, 5)
    found = controls.judge(rows, block, 5)
    assert found.flagged[:size].mean() > 0.8
    whole = controls.judge(rows, block, 5, one_cause=False)
    np.testing.assert_array_equal(found.flagged, whole.flagged)


@pytest.mark.parametrize("strengths", [(20.0, 20.0), (8.0, 24.0)])
def test_strong_and_weak_rows_of_one_attack_have_one_cause(strengths: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(120, WIDTH))
    vectors[:, 0] += np.linspace(*strengths, 120)
    cosines = (unit(vectors) @ unit(vectors).T).astype(np.float32)
    np.fill_diagonal(cosines, np.nan)
    assert separate(cosines) is None
    vectors[:50, 0] = rng.normal(size=50)
    vectors[:50, 1] += np.linspace(*strengths, 50)
    cosines = (unit(vectors) @ unit(vectors).T).astype(np.float32)
    np.fill_diagonal(cosines, np.nan)
    found = separate(cosines)
    assert found is not None
    np.testing.assert_array_equal(found if found[0] else ~found, np.arange(120) < 50)
    assert separate(cosines[35:65, 35:65]) is None  # too few to tell


def cosines_of(groups: dict[tuple[int, int], float], sizes: tuple[int, ...]) -> np.ndarray:
    """Cosines between groups of rows, NaN with themselves."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    table = np.zeros((len(sizes), len(sizes)), dtype=np.float32)
    for (one, other), value in groups.items():
        table[one, other] = table[other, one] = value
    cosines = table[np.ix_(group, group)]
    np.fill_diagonal(cosines, np.nan)
    return cosines


@pytest.mark.parametrize(
    ("within", "other", "between", "one_cause"),
    [
        (0.5, 0.5, 0.21, True),
        (0.5, 0.5, 0.19, False),
        (0.8, 0.2, 0.17, True),  # of the geometric mean: 0.425, neither of the larger
        (0.8, 0.2, 0.15, False),  # nor of the smaller one
    ],
)
def test_two_fifths_of_a_direction_are_one_cause(
    within: float, other: float, between: float, one_cause: bool
) -> None:
    parts = {(0, 0): within, (1, 1): other, (0, 1): between}
    found = separate(cosines_of(parts, (20, 20)))
    assert (found is None) == one_cause
    assert found is None or len({*found[:20]}) == len({*found[20:]}) == 1


def test_two_attacks_are_told_apart_by_what_and_not_by_how_much_they_share() -> None:
    """Each has rows that share a lot and rows that share a little."""
    parts = {(0, 0): 0.8, (0, 1): 0.16, (1, 1): 0.032, (2, 2): 0.8, (2, 3): 0.16, (3, 3): 0.032}
    found = separate(cosines_of(parts, (20, 40, 20, 40)))
    assert found is not None
    np.testing.assert_array_equal(found if found[0] else ~found, np.arange(120) < 60)


def test_causes_of_the_same_rows_are_looked_for_once(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        "defense.detectors.coherence.separate",
        lambda cosines: asked.append(len(cosines)) or separate(cosines),
    )
    vectors = vectors_with(BLOCK, OTHER, strength=24.0)
    rows = Rows(Vectors(vectors, {}), np.arange(SIZE))
    both = np.isin(np.arange(SIZE), [*BLOCK, *OTHER])
    first, part = rows.separate(both), rows.where(LABELS == 1)
    again = part.separate(both[LABELS == 1])
    assert first is not None
    np.testing.assert_array_equal(first, again)
    assert asked == [both.sum()]
    ours = np.isin(part.places, BLOCK)
    assert part.separate(ours) is None
    assert rows.separate(np.isin(rows.places, BLOCK)) is None
    assert asked == [both.sum(), len(BLOCK)]


@pytest.mark.parametrize("size", [2 * COMPONENTS, 600])
def test_leading_components_tell_causes_apart_as_all_of_them_do(size: int) -> None:
    """Twice as many rows as components, and many times as many."""
    vectors = np.random.default_rng(size).normal(size=(size, WIDTH))
    second = np.arange(size) >= size // 2
    vectors[second, 1] += 16
    vectors[~second, 0] += 16
    cosines = (unit(vectors) @ unit(vectors).T).astype(np.float32)
    np.fill_diagonal(cosines, np.nan)
    found = separate(cosines)
    assert found is not None
    np.testing.assert_array_equal(found == found[0], second == second[0])


def test_a_row_must_cohere_a_third_as_much_as_the_queries() -> None:
    rng = np.random.default_rng(0)
    controls = Controls(rng.normal(0, 0.01, (400, 500)).astype(np.float32), 0.05)
    scores = rng.normal(0, 0.003, 500).astype(np.float32)
    scores[:40], scores[40:60], scores[60:100] = 0.9, 0.32, 0.28
    found = controls.discoveries(Block(scores, scores, np.arange(16)))
    np.testing.assert_array_equal(np.flatnonzero(found), np.arange(60))


def test_inputs_that_lead_to_no_rows_are_of_one_incident_only_if_both_point_to_the_other() -> None:
    rng = np.random.default_rng(0)
    starts = rng.normal(size=(400, 60)).astype(np.float32)
    controls, rows = Controls(starts - np.median(starts, 0), 0.05), np.arange(60)

    def lost(start: np.ndarray, seeds: np.ndarray) -> Finding:
        block = Block(start.astype(np.float32), start.astype(np.float32), seeds)
        nothing = np.zeros(100, np.float32), np.zeros(0, np.int64)
        return Finding(rows < 0, block, (0.0, 0.0, 0.0), 0.0, 0.0, *nothing)

    first, second = rows < 16, (rows >= 16) & (rows < 32)
    one, other = lost(9.0 * first, rows[first]), lost(9.0 * second, rows[second])
    both = lost(9.0 * (first | second), rows[second])
    assert controls.are_of_one_incident(both, other)
    assert not controls.are_of_one_incident(both, one)
    assert not controls.are_of_one_incident(one, both)
    weak = [lost(1.8 * (first | second), rows[part]) for part in (first, second)]
    assert not controls.are_of_one_incident(*weak)  # clean inputs do as much


def test_several_other_attacks_on_one_class_are_left_out() -> None:
    vectors = vectors_with()
    parts = np.split(np.flatnonzero(LABELS == 1)[:138], [40, 120])
    for axis, part in zip((0, 1, 3), parts, strict=True):
        vectors[part] = shared(axis, None, len(part))
    rows = Rows(Vectors(vectors, {}), np.flatnonzero(LABELS == 1))
    clean = np.stack([towards(None, seed) for seed in range(100, 700)])
    controls = Controls((clean @ vectors[rows.places].T).astype(np.float32), 0.05)
    block = rows.grow((shared(0, 3) @ vectors[rows.places].T).astype(np.float32), 16, 5)
    found = controls.judge(rows, block, 5)
    np.testing.assert_array_equal(rows.places[found.flagged], parts[0])
