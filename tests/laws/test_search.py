"""What a search compares rows with: clean inputs of their class, and others where these are few."""

import numpy as np
import pytest
import torch

from defense.detectors.normalised_influence import NormalisedInfluence
from defense.detectors.search import CleanInputs, Search
from defense.detectors.whitening import Whitened
from tests.conftest import make_images
from tests.laws.blocks import BLOCK, LABELS, SIZE, case_of, towards, vectors_with
from tests.laws.cases import Vectors


def search_of(clean: int, *, everywhere: bool = False, seed: int = 8) -> Search:
    case = case_of(vectors_with(BLOCK), [towards(None, 3)], LABELS)
    inputs = CleanInputs(make_images(clean, seed=seed), torch.Generator().manual_seed(5))
    settings = NormalisedInfluence()
    return Search(settings, case.train, case.directions, inputs, everywhere=everywhere)


def test_rows_are_compared_in_the_metric_of_clean_inputs_and_these_without_themselves() -> None:
    search = search_of(800)
    bench = search.bench(1)
    seen = Whitened.by(Vectors(vectors_with(BLOCK)[LABELS == 1], {}), search.controls(1))
    np.testing.assert_allclose(bench.null.starts, seen.left_out(), atol=1e-6)
    some = np.array([7, 3])
    expected = seen.rows(some)
    expected[np.arange(2), some] = np.nan
    np.testing.assert_allclose(bench.rows.between(some), expected, atol=1e-6)


def test_rows_of_all_labels_are_compared_as_they_are() -> None:
    search = search_of(800, everywhere=True)
    vectors = vectors_with(BLOCK)
    bench = search.bench(1)
    assert len(bench.rows) == SIZE
    np.testing.assert_allclose(bench.null.starts, search.controls(1) @ vectors.T, atol=1e-6)


def test_a_control_finds_rows_as_if_the_metric_were_made_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it has in common with rows counts for less in a metric that it took part in."""
    search, number = search_of(400), 3
    bench = search.bench(2)
    known, start = bench.rows.directions, bench.null.starts[number]
    assert isinstance(known, Whitened)
    monkeypatch.setattr("defense.detectors.whitening.ridge", lambda *_: known.added)
    seen = Whitened.by(known.plain, np.delete(search.controls(2), number, axis=0))
    exact, leaking = (
        bench.null.judge(rows, rows.grow(start, 16, 5), 5, number).strength
        for rows in (bench.rows.seen(seen), bench.rows)
    )
    assert bench.strengths[number] == pytest.approx(exact, rel=1e-4)
    assert leaking < exact * 0.99


@pytest.mark.parametrize("label", [1, 2])
def test_p_values_of_a_class_whose_controls_are_lent_are_as_rare_as_they_say(label: int) -> None:
    """One class has sixteen times as many rows as the others, and each has 25 clean inputs."""
    p_values = []
    for seed in range(8, 12):
        search = search_of(100, seed=seed)
        drawn = np.stack([towards(None, 500 + number) for number in range(60)])
        starts = search.bench(label).rows.directions.towards(drawn)
        p_values += [next(search.sightings(label, start)).p_value for start in starts]
        finding = search.certain(label, starts[0])
        assert len(search.strengths(search.bench(label), label, finding)) == 100
    assert 0.4 < np.mean(p_values) < 0.65
    assert np.mean(np.array(p_values) <= 0.01) <= 0.02
    assert np.mean(np.array(p_values) <= 0.05) <= 0.08
