"""The default detector: what it promises about flags, verdicts and several affected inputs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom, spearmanr

from defense.detectors.pointing import Pointed
from defense.detectors.search import Search
from defense.errors import DataError
from defense.storage import load_flags, save_flags
from tests.conftest import make_images
from tests.laws.blocks import (
    BLOCK,
    LABELS,
    OTHER,
    SIZE,
    WIDTH,
    case_of,
    detect,
    of_inputs,
    towards,
    vectors_with,
)
from tests.laws.cases import unit


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


def test_flagged_rows_carry_the_chance_that_a_clean_input_coheres_as_much() -> None:
    vectors = vectors_with(BLOCK, OTHER)
    case = case_of(vectors, [towards(0, 3), towards(1, 4)], LABELS)
    flags = detect(case, subpopulation=None)
    np.testing.assert_array_equal(~np.isnan(flags.p_values), flags.mask)
    assert flags.p_values[flags.mask].min() > 0
    assert flags.p_values[flags.mask].max() <= 0.05 * flags.mask.sum() / (LABELS == 1).sum()
    one = detect(case_of(vectors_with(BLOCK), [towards(0, 3)], LABELS), subpopulation=None)
    assert spearmanr(one.suspicion[one.mask], one.p_values[one.mask]).statistic < -0.99
    nothing = detect(case_of(vectors, [towards(None, 7)], LABELS))
    assert np.isnan(nothing.p_values).all()


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


def test_a_block_of_which_no_row_stands_out_is_suspected(tmp_path: Path) -> None:
    """At a rate that nothing can reach; an input without a block stays unsuspected."""
    found, nothing = (
        detect(case_of(vectors_with(BLOCK), [affected], LABELS), false_discovery_rate=1e-12)
        for affected in (towards(0, 3), towards(None, 3))
    )
    assert not found.mask.any()
    incident = of_inputs(found)
    assert (incident.untold, incident.num_flagged, incident.precision) == (True, 0, None)
    assert incident.p_value <= 0.01
    assert found.verdict == "poison suspected"
    save_flags(tmp_path / "flags", found, inputs={})
    assert load_flags(tmp_path / "flags")[0].incidents == found.incidents
    assert not of_inputs(nothing).untold
    assert nothing.verdict == "nothing found"


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


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_block_that_is_a_large_part_of_its_class_is_found(share: float) -> None:
    block = np.flatnonzero(LABELS == 1)[: int(share * (LABELS == 1).sum())]
    flags = detect(case_of(vectors_with(block), [towards(0, 3)], LABELS))
    assert flags.verdict == "poison found"
    assert flags.mask[block].mean() > 0.95
    assert np.isin(np.flatnonzero(flags.mask), block).mean() > 0.95


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


def test_the_p_value_counts_the_incident_and_two_hundred_controls() -> None:
    case = case_of(vectors_with(BLOCK), [towards(0, 3)], LABELS)
    incident = of_inputs(detect(replace(case, controls=make_images(1000, seed=8))))
    assert incident.num_controls == 200
    assert incident.p_value == pytest.approx(1 / 201)


def test_too_few_clean_inputs_for_an_alarm_are_refused_and_other_classes_lend_theirs() -> None:
    case = case_of(vectors_with(BLOCK), [towards(0, 3)], LABELS)
    few, enough = (replace(case, controls=make_images(count, seed=8)) for count in (96, 100))
    with pytest.raises(DataError, match="takes 99 clean inputs, up to 200 of each class, got 96"):
        detect(few)
    incident = of_inputs(detect(enough))
    assert (incident.num_controls, incident.p_value) == (100, pytest.approx(1 / 101))


def test_an_input_that_cannot_be_judged_does_not_keep_others_from_it() -> None:
    """No clean input of the class that the model takes it for; the other is judged as ever."""
    case = case_of(vectors_with(BLOCK), [towards(0, 3), towards(0, 5)], LABELS)
    case = replace(case, queries=replace(case.queries, labels=torch.tensor([1, 2])))
    lacking = replace(case, controls=case.controls.where(case.controls.labels != 2))
    flags = detect(lacking)
    assert flags.mask[BLOCK].mean() > 0.9
    told, _, unknown = flags.incidents
    assert (told.label, told.affected, told.p_value) == (1, (0,), pytest.approx(1 / 201))
    assert (unknown.label, unknown.affected, unknown.p_value) == (2, (1,), None)
    assert replace(flags, threshold=np.inf, incidents=(unknown,)).verdict == "not measured"
    nobody = replace(lacking, controls=lacking.controls.where(lacking.controls.labels != 1))
    with pytest.raises(DataError, match="clean inputs of class b, got 0"):
        detect(nobody)


def test_rows_of_a_label_that_cannot_be_judged_are_not_flagged() -> None:
    """Even where all rows of the label that was judged are."""
    labels = np.where(np.arange(SIZE) % 2, 2, 3)
    labels[BLOCK] = 1
    case = case_of(vectors_with(BLOCK), [towards(0, 3), towards(0, 5)], labels)
    case = replace(case, queries=replace(case.queries, labels=torch.tensor([1, 2])))
    flags = detect(replace(case, controls=case.controls.where(case.controls.labels != 2)))
    assert flags.candidates[labels == 2].all()
    np.testing.assert_array_equal(np.flatnonzero(flags.mask), BLOCK)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_an_attack_that_reached_clean_inputs_is_found_and_these_are_named(count: int) -> None:
    """One in a hundred of them; each would be the most coherent clean input there is."""
    case = case_of(vectors_with(BLOCK), [towards(0, 3)], LABELS)
    own = np.flatnonzero(case.controls.labels == 1)[7 : 7 + count]
    hit = {
        case.controls.images(own)[place].contiguous().numpy().tobytes(): towards(0, 70 + place)
        for place in range(count)
    }
    directions = replace(case.directions, known=case.directions.known | hit)
    flags = detect(replace(case, directions=directions))
    incident = of_inputs(flags)
    assert flags.mask[BLOCK].mean() > 0.9
    assert incident.p_value == pytest.approx(1 / (incident.num_controls + 1))
    assert incident.num_controls == 200 - count  # others do not lend for these
    assert {*incident.alike} == {*case.controls.ids[own].tolist()}


def test_clean_inputs_that_another_attack_reached_are_named_with_it() -> None:
    """The second block behind the first, found by leaving out the one that coheres with it."""
    both = [unit(towards(0, 3) + 0.8 * towards(1, 4))]
    case = case_of(vectors_with(BLOCK, OTHER), both, LABELS)
    own = np.flatnonzero(case.controls.labels == 1)[[7]]
    image = case.controls.images(own)[0].contiguous().numpy().tobytes()
    known = case.directions.known | {image: towards(1, 70)}
    flags = detect(replace(case, directions=replace(case.directions, known=known)))
    assert flags.mask[np.union1d(BLOCK, OTHER)].mean() > 0.9
    assert of_inputs(flags).alike == tuple(case.controls.ids[own].tolist())


def test_controls_of_a_class_that_are_too_few_to_tell_are_joined_by_others() -> None:
    """A single one that is as strong does not decide, whether there are 99 of the class or not."""
    case = case_of(vectors_with(BLOCK), [towards(0, 3)], LABELS)
    clean = make_images(800, seed=8)
    kept = (clean.labels != 1) | (np.cumsum(clean.labels == 1) <= 150)
    incident = of_inputs(detect(replace(case, controls=clean.where(kept))))
    assert incident.num_controls > 200


def test_an_incident_is_judged_by_the_mean_of_its_inputs(monkeypatch) -> None:
    starts, sightings = [], Search.sightings

    def spied(self: Search, label: int, start: np.ndarray):
        starts.append(start)
        return sightings(self, label, start)

    monkeypatch.setattr(Search, "sightings", spied)
    vectors, inputs = vectors_with(BLOCK), [towards(0, 3), towards(0, 5)]
    flags = detect(case_of(vectors, inputs, LABELS), subpopulation=None)
    assert of_inputs(flags).affected == (0, 1)
    np.testing.assert_allclose(starts[-1], np.mean(starts[:2], axis=0), atol=1e-6)
