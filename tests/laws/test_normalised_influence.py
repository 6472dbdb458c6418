"""The default detector: what it promises about flags, verdicts and several affected inputs."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import betabinom, binom, false_discovery_control

from defense.detectors.coherence import Block, Rows, separate
from defense.detectors.controls import Controls, Finding, exceedance, local_rates
from defense.detectors.normalised_influence import NormalisedInfluence, together
from defense.detectors.search import Bench, Pointed, Search
from defense.errors import DataError
from defense.evidence import Incident
from defense.records import Case, Flags, ImageSet, Queries
from tests.conftest import make_images
from tests.laws.test_detectors import Flat, Vectors, unit

SIZE, WIDTH = 2000, 256


def vectors_with(*blocks: np.ndarray, strength: float = 12.0) -> np.ndarray:
    """Random unit vectors; those of a block have a part in common."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(SIZE, WIDTH))
    for axis, block in enumerate(blocks):
        vectors[block, axis] += strength
    return unit(vectors)


def towards(axis: int | None, seed: int, strength: float = 12.0) -> np.ndarray:
    vector = np.random.default_rng(seed).normal(size=WIDTH)
    if axis is not None:
        vector[axis] += strength
    return unit(vector)


def case_of(vectors: np.ndarray, affected: list[np.ndarray], labels: np.ndarray) -> Case:
    """Rows of class 1 with these directions, other rows with labels of their own."""
    train = make_images(SIZE, seed=8)
    train = ImageSet(train.pixels, labels, *list(vars(train).values())[2:])
    images = make_images(len(affected), seed=21).images()
    known = {
        image.contiguous().numpy().tobytes(): vector
        for image, vector in zip(images, affected, strict=True)
    }
    numbers = torch.arange(len(affected))
    queries = Queries(images, torch.ones(len(affected), dtype=torch.int64), numbers, numbers * 0)
    nothing = np.zeros((len(affected), SIZE), np.float32)
    model = Flat(train, np.zeros(SIZE, bool)).eval()
    return Case(train, model, queries, nothing, Vectors(vectors, known), make_images(800, seed=8))


def detect(case: Case, **options) -> Flags:
    rule = NormalisedInfluence(**options)
    return rule.detect(case, torch.Generator().manual_seed(5))


def of_inputs(flags: Flags) -> Incident:
    """Take the only incident that affected inputs are of."""
    (incident,) = [incident for incident in flags.incidents if incident.affected]
    return incident


LABELS = np.where(np.arange(SIZE) < 1600, 1, np.arange(SIZE) % 4)
BLOCK = np.arange(0, 200, 5)  # 40 rows of class 1
OTHER = np.arange(1, 300, 6)  # 50 others


def test_flags_the_block_of_an_incident_and_says_how_sure_it_is() -> None:
    flags = detect(case_of(vectors_with(BLOCK), [towards(0, 3)], LABELS))
    assert flags.verdict == "poison found"
    incident = of_inputs(flags)
    assert incident.p_value <= 0.02
    assert flags.mask[BLOCK].mean() > 0.95
    flagged = np.flatnonzero(flags.mask)
    assert incident.num_flagged == len(flagged)
    mean, low, high = incident.precision
    assert low <= mean <= high
    assert low - 0.03 <= np.isin(flagged, BLOCK).mean() <= high + 0.03


def test_what_is_left_after_the_flags_looks_like_controls() -> None:
    incident = of_inputs(detect(case_of(vectors_with(BLOCK), [towards(0, 3)], LABELS)))
    assert incident.p_value_left > 0.1


def test_a_second_block_behind_the_first_is_flagged_too() -> None:
    both = towards(0, 3) + 0.8 * towards(1, 4)
    flags = detect(case_of(vectors_with(BLOCK, OTHER), [unit(both)], LABELS))
    incident = of_inputs(flags)
    assert incident.num_flagged == flags.mask.sum()
    assert flags.mask[BLOCK].mean() > 0.95
    assert flags.mask[OTHER].mean() > 0.95
    assert incident.p_value_left > 0.01
    low, high = incident.precision[1:]
    assert low - 0.03 <= np.isin(np.flatnonzero(flags.mask), [*BLOCK, *OTHER]).mean() <= high + 0.03


def test_finds_nothing_for_an_input_without_a_block() -> None:
    flags = detect(case_of(vectors_with(BLOCK), [towards(None, 3)], LABELS))
    assert flags.verdict == "nothing found"
    assert flags.incidents[0].p_value > 0.02
    assert flags.incidents[0].num_flagged == 0
    assert flags.incidents[0].p_value_left is None


def test_says_which_labels_an_input_points_to_and_warns_if_it_is_another(caplog) -> None:
    case = case_of(vectors_with(BLOCK), [towards(0, 3)], LABELS)
    incident = of_inputs(detect(case))
    counts = np.bincount(LABELS, minlength=4)
    assert np.argmax(incident.enrichment) == 1
    assert np.dot(incident.enrichment, counts) / SIZE == pytest.approx(1)
    assert not caplog.records
    others = np.flatnonzero(LABELS == 2)[:60]
    incident = of_inputs(detect(case_of(vectors_with(others), [towards(0, 3)], LABELS)))
    assert np.argmax(incident.enrichment) == 2
    assert "set detector.rows to all" in caplog.text
    flags = detect(case_of(vectors_with(others), [towards(0, 3)], LABELS), rows="all")
    assert flags.mask[others].mean() > 0.95


def test_advice_about_labels_is_given_where_it_can_be_followed(caplog) -> None:
    others = np.flatnonzero(LABELS == 2)[:60]
    case = case_of(vectors_with(others), [towards(0, 3)], LABELS)
    assert of_inputs(detect(case)).rival == 2
    assert "set detector.rows to all" in caplog.text
    caplog.clear()
    found = of_inputs(detect(case, rows="all"))
    assert np.argmax(found.enrichment) == 2
    assert found.rival is None
    assert not caplog.records


def test_chance_is_no_reason_to_look_at_other_labels() -> None:
    sample, rng = np.array([800, 60, 60, 60, 20]), np.random.default_rng(3)
    labels = np.repeat(np.arange(5), sample)
    drawn = [Pointed(np.bincount(rng.choice(labels, 80, replace=False), minlength=5), sample)
             for _ in range(1000)]  # fmt: skip
    assert np.mean([np.argmax(pointed.enrichment) != 0 for pointed in drawn]) > 0.8
    assert np.mean([pointed.rival(0, 0.01) is not None for pointed in drawn]) <= 0.01


@pytest.mark.parametrize(
    ("leading", "sample", "rival"),
    [
        ([50, 28, 1, 1, 0], [800, 60, 60, 60, 20], 1),
        ([28, 50, 1, 1, 0], [60, 800, 60, 60, 20], None),  # the given label is enriched most
        ([40, 40, 0, 0, 0], [60, 60, 800, 60, 20], None),  # both are, as much
        ([10, 70, 0, 0, 0], [60, 60, 800, 60, 20], 1),  # the given one is, the other is more
        ([5, 70, 1, 0, 0], [800, 800, 800, 800, 5], 1),
        ([5, 70, 0, 0, 1], [800, 800, 800, 800, 5], 1),  # one row of a rare label says nothing
        ([0, 82, 0, 0, 0], [0, 900, 900, 900, 900], 1),  # no row of the given label is there
        ([0, 80, 2, 0, 0], [5, 900, 900, 900, 900], 1),  # nor does one lead
        ([30, 50], [500, 500], None),
        ([20, 60], [500, 500], 1),
        ([82], [900], None),
    ],
)
def test_a_label_that_surely_is_enriched_more_is_named(leading, sample, rival) -> None:
    assert Pointed(np.array(leading), np.array(sample)).rival(0, 0.01) == rival


def test_the_chance_that_a_rival_is_none_counts_all_labels() -> None:
    pointed = Pointed(np.array([56, 12, 6, 6]), np.array([700, 50, 125, 125]))
    chance = 4 * binom.sf(11, 80, 0.05)
    assert pointed.rival(0, chance * 1.001) == 1
    assert pointed.rival(0, chance * 0.999) is None


def test_four_blocks_one_behind_the_other_are_all_flagged() -> None:
    blocks = [np.arange(start, 1200, 30) for start in (0, 7, 14, 21)]
    vectors = vectors_with(*blocks)
    strengths = np.array([12.0, 10.0, 8.0, 6.5])
    affected = np.random.default_rng(3).normal(size=WIDTH)
    affected[:4] += strengths
    flags = detect(case_of(vectors, [unit(affected)], LABELS), subpopulation=None)
    shares = [flags.mask[block].mean() for block in blocks]
    assert min(shares) > 0.9, shares
    assert of_inputs(flags).p_value_left > 0.01


def test_a_block_beyond_the_last_that_is_taken_out_is_told(monkeypatch) -> None:
    both = unit(towards(0, 3) + 0.8 * towards(1, 4))
    case = case_of(vectors_with(BLOCK, OTHER), [both], LABELS)
    every = detect(case, subpopulation=None)
    monkeypatch.setattr("defense.detectors.search.PASSES", 1)
    flags = detect(case, subpopulation=None)
    assert every.mask[[*BLOCK, *OTHER]].mean() > 0.95
    assert min(flags.mask[BLOCK].mean(), flags.mask[OTHER].mean()) < 0.2
    assert max(flags.mask[BLOCK].mean(), flags.mask[OTHER].mean()) > 0.95
    incident = of_inputs(flags)
    assert incident.num_flagged == flags.mask.sum()
    assert incident.p_value_left <= 0.01 < of_inputs(every).p_value_left


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


@pytest.mark.parametrize("strength", [4.0, 6.0])
def test_more_evidence_does_not_hurt(strength: float) -> None:
    """Weak affected inputs: those of one incident find at least what the first one finds."""
    vectors = vectors_with(BLOCK)
    directions = [towards(0, seed, strength) for seed in range(3, 8)]
    case = case_of(vectors, directions, LABELS)
    alone, several = (detect(case, affected=count).mask[BLOCK].mean() for count in (1, 5))
    assert several >= alone


def test_rows_of_other_labels_are_flagged_only_on_request() -> None:
    block = np.arange(0, SIZE, 50)  # of all classes
    case = case_of(vectors_with(block), [towards(0, 3)], LABELS)
    restricted, everywhere = detect(case), detect(case, rows="all")
    assert not restricted.mask[LABELS != 1].any()
    assert everywhere.mask[block].mean() > 0.95


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_the_false_discovery_rate_is_held(rate: float) -> None:
    shares, found = [], 0
    for seed in range(8):
        case = case_of(vectors_with(BLOCK, strength=5.0), [towards(0, seed)], LABELS)
        mask = detect(case, false_discovery_rate=rate).mask
        found += mask[BLOCK].sum()
        shares.append((mask.sum() - mask[BLOCK].sum()) / max(1, mask.sum()))
    assert found > 8 * 0.15 * len(BLOCK)
    assert np.mean(shares) < 1.5 * rate


def test_verdicts_without_an_incident_are_rarely_alarms() -> None:
    vectors = vectors_with(BLOCK)
    found = [
        detect(case_of(vectors, [towards(None, seed)], LABELS), alarm=0.1).verdict
        for seed in range(40)
    ]
    assert found.count("poison found") <= 10  # 4 on average


def test_a_case_without_directions_or_controls_is_refused() -> None:
    case = case_of(vectors_with(BLOCK), [towards(0, 3)], LABELS)
    for lacking in ("directions", "controls"):
        with pytest.raises(DataError, match="run: dvc repro directions"):
            detect(replace(case, **{lacking: None}))


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


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_block_that_is_a_large_part_of_its_class_is_found(share: float) -> None:
    block = np.flatnonzero(LABELS == 1)[: int(share * (LABELS == 1).sum())]
    flags = detect(case_of(vectors_with(block), [towards(0, 3)], LABELS))
    assert flags.verdict == "poison found"
    assert flags.mask[block].mean() > 0.95
    assert np.isin(np.flatnonzero(flags.mask), block).mean() > 0.95


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
        return Finding(flagged, block, (0.0, 0.0, 0.0), 0.0, 0.0)

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


def test_equal_directions_are_no_reason_for_infinite_scores() -> None:
    controls = Controls(np.ones((30, 9), dtype=np.float32), 0.05)
    assert np.isfinite(controls.standardised(np.linspace(-1, 1, 9, dtype=np.float32))).all()


@pytest.mark.parametrize("count", [0, 1])
def test_a_label_without_rows_or_without_controls_is_refused(count: int) -> None:
    labels = np.where(np.arange(SIZE) < count, 1, 2)
    case = case_of(vectors_with(BLOCK), [towards(0, 3)], labels)
    with pytest.raises(
        DataError, match=f"two or more rows with the label b .* got {count}; set rows"
    ):
        detect(case)
    case = case_of(vectors_with(BLOCK), [towards(0, 3)], LABELS)
    others = case.controls.where(case.controls.labels != 1)
    with pytest.raises(DataError, match="20 or more clean inputs of class b, got 0"):
        detect(replace(case, controls=others))


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
        return Finding(rows < 0, block, (0.0, 0.0, 0.0), 0.0, 0.0)

    first, second = rows < 16, (rows >= 16) & (rows < 32)
    one, other = lost(9.0 * first, rows[first]), lost(9.0 * second, rows[second])
    both = lost(9.0 * (first | second), rows[second])
    assert controls.are_of_one_incident(both, other)
    assert not controls.are_of_one_incident(both, one)
    assert not controls.are_of_one_incident(one, both)
    weak = [lost(1.8 * (first | second), rows[part]) for part in (first, second)]
    assert not controls.are_of_one_incident(*weak)  # clean inputs do as much


def test_what_all_clean_inputs_cohere_with_is_no_evidence() -> None:
    rng = np.random.default_rng(0)
    usual = rng.normal(0, 3, 200).astype(np.float32)
    controls = Controls(usual + rng.normal(size=(401, 200)).astype(np.float32), 0.05)
    assert np.abs(controls.standardised(usual)).max() < 0.5
    assert controls.standardised(usual + 5).mean() == pytest.approx(5, rel=0.1)


def test_strength_adds_up_over_rows() -> None:
    controls = Controls(np.random.default_rng(0).normal(size=(99, 40)).astype(np.float32), 0.05)
    start, rows = 8 * np.ones(40, np.float32), np.arange(40)
    few, many = (controls.strength(Block(start, start, rows), rows < count) for count in (20, 40))
    assert many == pytest.approx(2 * few, rel=0.1)
    against = np.where(rows < 20, start, -start)
    assert controls.strength(Block(against, start, rows), rows < 40) == pytest.approx(few)


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


def test_the_p_value_counts_the_incident_and_two_hundred_controls() -> None:
    case = case_of(vectors_with(BLOCK), [towards(0, 3)], LABELS)
    incident = of_inputs(detect(replace(case, controls=make_images(1000, seed=8))))
    assert incident.num_controls == 200
    assert incident.p_value == pytest.approx(1 / 201)


def test_a_control_that_is_replayed_is_not_compared_with_itself() -> None:
    vectors = vectors_with(BLOCK)
    clean = np.stack([towards(None if seed else 0, seed + 100) for seed in range(30)])
    rows = Rows(Vectors(vectors, {}), np.arange(SIZE))
    null = Controls((clean @ vectors.T).astype(np.float32), 0.05)
    bench = Bench(NormalisedInfluence(), rows, null)
    assert bench.strengths[0] > 5 * max(bench.strengths[1:])


def test_too_few_clean_inputs_for_an_alarm_are_refused_and_other_classes_lend_theirs() -> None:
    case = case_of(vectors_with(BLOCK), [towards(0, 3)], LABELS)
    few, enough = (replace(case, controls=make_images(count, seed=8)) for count in (96, 100))
    with pytest.raises(DataError, match="takes 99 clean inputs, got 96"):
        detect(few)
    incident = of_inputs(detect(enough))
    assert (incident.num_controls, incident.p_value) == (100, pytest.approx(1 / 101))


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


def test_an_incident_is_judged_by_the_mean_of_its_inputs(monkeypatch) -> None:
    starts, sightings = [], Search.sightings

    def spied(self: Search, label: int, start: np.ndarray):
        starts.append(start)
        return sightings(self, label, start)

    monkeypatch.setattr(Search, "sightings", spied)
    vectors, inputs = vectors_with(BLOCK), [towards(0, 3), towards(0, 5)]
    flags = detect(case_of(vectors, inputs, LABELS), subpopulation=None)
    assert of_inputs(flags).affected == (0, 1)
    expected = np.mean(inputs, axis=0) @ vectors[LABELS == 1].T
    np.testing.assert_allclose(starts[-1], expected, atol=1e-6)
