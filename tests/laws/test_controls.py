"""How clean inputs say what chance can do, and how blocks grow."""

from functools import partial

import numpy as np
import pytest
from scipy.stats import betabinom, false_discovery_control, genpareto

from defense.detectors.coherence import Block, Rows
from defense.detectors.controls import Controls, exceedance, local_rates
from defense.detectors.normalised_influence import NormalisedInfluence
from defense.detectors.search import Bench
from tests.laws.blocks import (
    BLOCK,
    LABELS,
    OTHER,
    SIZE,
    case_of,
    detect,
    of_inputs,
    towards,
    vectors_with,
)
from tests.laws.cases import Vectors, unit


def test_growing_leaves_a_row_out_of_its_own_judgement() -> None:
    vectors = vectors_with(BLOCK)
    rows = Rows(Vectors(vectors, {}), np.arange(SIZE))
    between = rows.between(np.array([7, 3]))
    assert np.isnan(between[[0, 1], [7, 3]]).all()
    assert np.isfinite(np.delete(between, [3, 7], axis=1)).all()
    block = rows.grow(towards(0, 3) @ vectors.T, seeds=8, rounds=5)
    assert np.isfinite(block.scores).all()
    assert set(block.seeds) < set(BLOCK)
    assert np.median(block.scores[BLOCK]) > 2 * np.delete(block.scores, BLOCK).max()
    own = block.seeds[0]
    expected = np.median(vectors[np.delete(block.seeds, 0)] @ vectors[own])
    assert block.scores[own] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("draw", ["normal", "exponential", "standard_t"])
@pytest.mark.parametrize("count", [60, 1000])
def test_chances_are_those_of_the_distribution(draw: str, count: int) -> None:
    """On average over samples, at quantiles within and beyond what a sample reaches."""
    rng = np.random.default_rng(0)
    sample = partial(getattr(rng, draw), *([5] if draw == "standard_t" else []))
    large = np.sort(sample(size=10**6))
    for chance in (0.5, 0.1, 0.01, 0.002):
        value = np.array([large[int((1 - chance) * len(large))]])
        found = np.mean([exceedance(sample(size=count), value)[0] for _ in range(200)])
        assert chance / 2 < found < 4 * chance, chance  # tails lighter than exponential: careful


def test_a_small_sample_has_an_exponential_tail() -> None:
    """Of 36 controls seven are in the tail, too few to tell its shape."""
    null = np.random.default_rng(3).pareto(0.7, size=36)
    limit = np.quantile(null, 0.8)
    beyond = null[null > limit] - limit
    far = np.array([0.5, 3.0, 20.0]) * beyond.mean()
    expected = (1 + len(beyond)) / 37 * np.exp(-far / beyond.mean())
    np.testing.assert_allclose(exceedance(null, limit + far), expected, rtol=1e-6)


def test_no_tail_is_heavier_than_one_with_a_variance() -> None:
    null = np.random.default_rng(3).pareto(0.4, size=1000)  # it has no mean either
    limit = np.quantile(null, 0.8)
    beyond = null[null > limit] - limit
    far = np.array([10.0, 1000.0]) * beyond.mean()
    tail = genpareto(0.5, scale=beyond.mean() / 2)
    expected = (1 + len(beyond)) / 1001 * tail.sf(far)
    np.testing.assert_allclose(exceedance(null, limit + far), expected, rtol=1e-5)


def test_chances_fall_with_the_value_and_are_never_nothing() -> None:
    null = np.random.default_rng(0).normal(size=50).astype(np.float32)
    chances = exceedance(null, np.linspace(-5, 50, 400).astype(np.float32))
    assert (np.diff(chances) <= 0).all()
    assert 0 < chances.min() < 1e-6
    assert chances.max() == 1
    assert exceedance(np.ones(50, np.float32), np.array([1.0, 2.0]))[0] > 0.9


def test_a_control_is_not_compared_with_itself() -> None:
    starts = np.random.default_rng(0).normal(size=(30, 100)).astype(np.float32)
    controls, block = Controls(starts, 0.05), Block(starts[4], starts[4], np.array([1, 2, 3]))
    expected = np.median(np.delete(starts, 4, axis=0)[:, 1:4], axis=1)
    np.testing.assert_array_equal(controls.null(block, without=4), expected)


@pytest.mark.parametrize(("count", "left_out"), [(0, 0), (1, 1), (4, 4), (5, 0)])
def test_few_controls_that_cohere_as_rows_do_are_left_out(count: int, left_out: int) -> None:
    """One in a hundred of 400; more than that may be chance."""
    starts = np.random.default_rng(0).normal(0, 0.1, size=(400, 60)).astype(np.float32)
    starts[10 : 10 + count, :16] = 0.6
    scores = np.where(np.arange(60) < 16, 1.0, 0.0).astype(np.float32)
    controls, block = Controls(starts, 0.05, 0.01), Block(scores, scores, np.arange(16))
    assert controls.alike(block).tolist() == [*range(10, 10 + left_out)]
    assert len(controls.null(block)) == 400 - left_out
    assert len(controls.null(block, without=100)) == 399 - left_out
    assert controls.null(block).max() == pytest.approx(0.6 if count > left_out else 0.1, abs=0.1)
    weak = Block(scores, scores / 10, np.arange(16))  # as rows are that chance picked
    assert len(controls.alike(weak)) == 0


def test_local_rates_are_the_share_of_clean_rows_around_a_p_value() -> None:
    rng = np.random.default_rng(0)
    p_values = np.concatenate([rng.uniform(size=200_000), rng.beta(0.1, 1, size=20_000)])
    rates = local_rates(p_values)
    order = np.argsort(p_values)
    assert (np.diff(rates[order]) >= 0).all()
    for wanted in (1e-4, 1e-3, 1e-2):
        place = order[np.searchsorted(p_values[order], wanted)]
        density = (10 + 0.1 * wanted**-0.9) / 11
        assert rates[place] == pytest.approx(1 / density, rel=0.2)


def test_a_clean_row_far_from_a_block_is_not_flagged_for_its_sake() -> None:
    rng = np.random.default_rng(0)
    starts = rng.normal(size=(400, SIZE)).astype(np.float32)
    scores = np.median(rng.normal(size=(16, SIZE)), axis=0).astype(np.float32)
    scores[:200] = rng.normal(3, 0.2, 200)
    scores[200] = 1.05  # beyond nearly all controls, and far from the block
    block = Block(scores, scores, np.arange(16))
    found = Controls(starts, 0.05).discoveries(block)
    np.testing.assert_array_equal(np.flatnonzero(found), np.arange(200))
    p_values = exceedance(Controls(starts, 0.05).null(block), scores)
    assert (false_discovery_control(p_values) <= 0.05)[200]


def test_equal_directions_are_no_reason_for_infinite_scores() -> None:
    controls = Controls(np.ones((30, 9), dtype=np.float32), 0.05)
    assert np.isfinite(controls.standardised(np.linspace(-1, 1, 9, dtype=np.float32))).all()


def test_rows_that_cohere_most_become_queries_more_than_once() -> None:
    vectors = vectors_with(BLOCK)
    rows = Rows(Vectors(vectors, {}), np.arange(SIZE))
    start = (towards(0, 3, 3.0) @ vectors.T).astype(np.float32)
    first, last = (rows.grow(start, seeds=16, rounds=rounds) for rounds in (1, 5))
    assert not set(first.seeds) <= set(BLOCK)
    assert set(last.seeds) <= set(BLOCK)


def test_many_rows_give_the_same_cosines_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more rows than are kept in memory nothing is kept, and parts are computed in turn."""
    vectors = vectors_with(BLOCK)[:300]
    kept = np.arange(300) % 3 > 0
    start = (towards(0, 3) @ vectors.T).astype(np.float32)
    few = Rows(Vectors(vectors, {}), np.arange(300))
    expected = few.grow(start, 16, 5), few.mean(), few.where(kept).grow(start[kept], 16, 5)
    monkeypatch.setattr("defense.detectors.coherence.MEMORY", 0)
    monkeypatch.setattr("defense.detectors.coherence.CHUNK", 7 * 300)
    many = Rows(Vectors(vectors, {}), np.arange(300))
    found = many.grow(start, 16, 5), many.mean(), many.where(kept).grow(start[kept], 16, 5)
    assert many.all is None
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
    for one, other in ((found[0], expected[0]), (found[2], expected[2])):
        np.testing.assert_array_equal(one.seeds, other.seeds)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)


def test_a_tail_is_taken_one_standard_error_heavier() -> None:
    """Of a sample whose quantiles are those of an exponential distribution, of shape 0."""
    null = -np.log(1 - (np.arange(1000) + 0.5) / 1000)
    far = np.array([-np.log(1e-4)])
    shape = 1 / 200**0.5
    depth = (far[0] - np.log(5)) / (1 - shape)
    assert exceedance(null, far)[0] == pytest.approx(
        0.2 * (1 + shape * depth) ** (-1 / shape), rel=0.15
    )
    assert exceedance(null, far)[0] > 1.4e-4


def test_what_all_clean_inputs_cohere_with_is_no_evidence() -> None:
    rng = np.random.default_rng(0)
    usual = rng.normal(0, 3, 200).astype(np.float32)
    controls = Controls(usual + rng.normal(size=(401, 200)).astype(np.float32), 0.05)
    assert np.abs(controls.standardised(usual)).max() < 0.5
    assert controls.standardised(usual + 5).mean() == pytest.approx(5, rel=0.1)


def test_strength_adds_up_over_rows() -> None:
    controls = Controls(np.random.default_rng(0).normal(size=(99, 40)).astype(np.float32), 0.05)
    start, rows = 8 * np.ones(40, np.float32), np.arange(40)
    few, many = (
        controls.strength(Block(start, (rows < count).astype(np.float32), rows))
        for count in (20, 40)
    )
    assert many == pytest.approx(2 * few, rel=0.1)
    mixed = np.where(rows < 20, 1.0, -1.0).astype(np.float32)
    assert controls.strength(Block(start, mixed, rows)) == pytest.approx(few)
    assert controls.strength(Block(start, mixed / 2, rows)) == pytest.approx(few / 2)


@pytest.mark.parametrize(
    ("count", "least", "flags", "wider"),
    [(100, 6.0, 20, "number"), (1000, 2.5, 400, "samples")],
)
def test_the_wider_of_two_intervals_of_false_flags_is_told(
    count: int, least: float, flags: int, wider: str
) -> None:
    """Of few controls their number leaves more open than their tail, of many it may not."""
    null = np.random.default_rng(0).normal(size=count).astype(np.float32)
    controls = Controls(np.repeat(null[:, None], 1520, axis=1), 0.05)
    scores = np.zeros(1520, np.float32)
    scores[:flags] = np.linspace(least, least + 1, flags)
    rows = Rows(Vectors(np.eye(1520, 8), {}), np.arange(1520))
    found = controls.judge(rows, Block(scores, scores, np.arange(flags)), 0, one_cause=False)
    flagged = found.block.scores[found.flagged]
    mean, low, high = found.expected_false
    clean = (~found.flagged).sum()
    assert mean == pytest.approx(clean * exceedance(null, np.array([flagged.min()]))[0])
    reached = (null >= flagged.min()).sum()
    counted = betabinom(clean, reached + 0.5, count - reached + 0.5).ppf([0.025, 0.975])
    assert low <= counted[0]
    if wider == "number":
        assert high == counted[1] > 10 * max(1, mean)
    else:
        assert high > 1.3 * counted[1]


def test_a_thousand_controls_hold_six_false_flags_possible() -> None:
    null = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    controls = Controls(np.repeat(null[:, None], 2020, axis=1), 0.05)
    scores = np.r_[np.full(20, 20.0), np.zeros(2000)].astype(np.float32)
    rows = Rows(Vectors(np.eye(2020, 8), {}), np.arange(2020))
    found = controls.judge(rows, Block(scores, scores, np.arange(20)), 0, one_cause=False)
    assert found.expected_false == (pytest.approx(0, abs=0.01), 0, 6)


def test_false_flags_of_several_blocks_add_up() -> None:
    both = [unit(towards(0, 3) + 0.8 * towards(1, 4))]
    several = of_inputs(detect(case_of(vectors_with(BLOCK, OTHER), both, LABELS)))
    one = of_inputs(detect(case_of(vectors_with(BLOCK), [towards(0, 3)], LABELS)))
    assert several.expected_false[2] > 1.5 * one.expected_false[2]


def test_a_control_that_is_replayed_is_not_compared_with_itself() -> None:
    vectors = vectors_with(BLOCK)
    clean = np.stack([towards(None if seed else 0, seed + 100) for seed in range(30)])
    rows = Rows(Vectors(vectors, {}), np.arange(SIZE))
    null = Controls((clean @ vectors.T).astype(np.float32), 0.05)
    bench = Bench(NormalisedInfluence(), rows, null)
    assert bench.strengths[0] > 2 * max(bench.strengths[1:])
    block = bench.grow(null.starts[0])
    alone, among = (null.judge(bench.rows, block, 5, without) for without in (0, None))
    assert (len(alone.null), len(among.null)) == (29, 30)
    assert alone.null.max() < among.null.max()
