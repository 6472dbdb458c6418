"""Cosines in the metric of clean inputs, against the inverse covariance written out."""

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.metrics import average_precision_score

from defense.detectors.coherence import Rows
from defense.detectors.whitening import RowsWithout, Whitened
from tests.laws.cases import Vectors, unit

WIDTH = 48


def drawn(count: int, seed: int) -> np.ndarray:
    """Unit vectors that differ most along the same five axes, none of them around zero."""
    rng = np.random.default_rng(seed)
    along = rng.normal(size=(count, 5)) * 4
    return unit(rng.normal(size=(count, WIDTH)) + along @ np.eye(5, WIDTH) + 0.5)


def inverse(clean: np.ndarray, added: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean, and inverse of the scatter and what is added to it."""
    apart = clean - clean.mean(0)
    return clean.mean(0), np.linalg.inv(apart.T @ apart + added * np.eye(WIDTH))


def cosines(one: np.ndarray, other: np.ndarray, mean: np.ndarray, metric: np.ndarray) -> np.ndarray:
    one, other = one - mean, other - mean
    lengths = [np.sqrt(np.einsum("ij,jk,ik->i", part, metric, part)) for part in (one, other)]
    return one @ metric @ other.T / np.outer(*lengths)


def shrinkage(clean: np.ndarray) -> float:
    """What turns the scatter into the covariance that scikit-learn shrinks, times a factor."""
    apart = clean - clean.mean(0)
    share = ledoit_wolf_shrinkage(apart, assume_centered=True)
    return share / (1 - share) * (apart**2).sum() / WIDTH


@pytest.mark.parametrize("count", [20, 120])
def test_rows_and_inputs_are_compared_in_the_metric_written_out(count: int) -> None:
    rows, inputs, clean = drawn(30, 0), drawn(4, 1), drawn(count, 2).astype(np.float64)
    found = Whitened.by(Vectors(rows, {}), clean.astype(np.float32))
    assert found.added == pytest.approx(shrinkage(clean), rel=1e-4)
    exact = inverse(clean, found.added)
    some = np.array([7, 3, 20])
    np.testing.assert_allclose(found.rows(some), cosines(rows[some], rows, *exact), atol=1e-4)
    np.testing.assert_allclose(found.towards(inputs), cosines(inputs, rows, *exact), atol=1e-4)
    taken = found.take(some)
    np.testing.assert_allclose(
        taken.towards(inputs), cosines(inputs, rows[some], *exact), atol=1e-4
    )
    np.testing.assert_allclose(
        taken.rows(np.array([1])), cosines(rows[some][1:2], rows[some], *exact), atol=1e-4
    )


@pytest.mark.parametrize("count", [20, 120])
def test_a_clean_input_is_seen_as_if_the_metric_were_made_without_it(count: int) -> None:
    rows, clean = drawn(30, 0), drawn(count, 2).astype(np.float64)
    found = Whitened.by(Vectors(rows, {}), clean.astype(np.float32))
    expected = [
        cosines(clean[[one]], rows, *inverse(np.delete(clean, one, axis=0), found.added))[0]
        for one in range(count)
    ]
    np.testing.assert_allclose(found.left_out(), expected, atol=1e-4)


def test_clean_inputs_are_to_rows_what_other_clean_rows_are() -> None:
    """Within the metric they lie too close to their mean; left out of it they do not."""
    rows, clean = drawn(400, 0), drawn(60, 2)
    found = Whitened.by(Vectors(rows, {}), clean)
    usual = np.abs(found.rows(np.arange(200))[:, 200:]).mean()
    assert np.abs(found.left_out()).mean() == pytest.approx(usual, rel=0.1)


def test_clean_inputs_that_are_all_the_same_leave_finite_cosines() -> None:
    rows, same = drawn(30, 0), np.repeat(drawn(1, 2), 20, axis=0)
    found = Whitened.by(Vectors(rows, {}), same)
    assert np.isfinite(found.rows(np.arange(30))).all()
    assert np.isfinite(found.left_out()).all()


def test_rows_of_one_cause_stand_out_of_what_all_rows_differ_by() -> None:
    rows, planted = drawn(300, 0), np.arange(300) < 40
    rows = unit(rows + 0.3 * np.outer(planted, np.eye(WIDTH)[-1]))
    plain = Vectors(rows, {})
    seen = Whitened.by(plain, drawn(200, 2))
    others = np.arange(40)
    before, after = (
        average_precision_score(planted, np.median(kind.rows(others), axis=0))
        for kind in (plain, seen)
    )
    assert before < 0.6
    assert after > 0.85


@pytest.mark.parametrize("count", [20, 120])
def test_rows_are_seen_as_if_the_metric_were_made_without_a_clean_input(count: int) -> None:
    vectors, clean = drawn(30, 0), drawn(count, 2).astype(np.float64)
    rows = Rows(Vectors(vectors, {}), np.arange(30))
    seen = Whitened.by(rows.directions, clean.astype(np.float32))
    found = RowsWithout(rows.seen(seen), seen, 3)
    exact = inverse(np.delete(clean, 3, axis=0), seen.added)
    some = np.array([7, 3, 20])
    expected = cosines(vectors[some], vectors, *exact)
    expected[np.arange(3), some] = np.nan
    np.testing.assert_allclose(found.between(some), expected, atol=1e-4)
    assert np.abs(found.between(some) - rows.seen(seen).between(some))[:, 0].max() > 1e-3
