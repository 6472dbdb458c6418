"""Doubts about labels: planted flips rank first, on a model that has learnt them by heart too."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn

from defense.compute import seeded
from defense.datasets.digits import Digits
from defense.errors import DataError
from defense.influence.directions import StoredDirections
from defense.influence.factors import FactorSettings, fit_factors
from defense.influence.store import DirectionSettings, build_store
from defense.labels import contradiction, doubt_labels, support
from defense.models.small_cnn import SmallCnn
from defense.prediction import predict
from defense.recipe import Recipe
from defense.records import ImageSet
from defense.victim import make_trainer
from tests.conftest import make_images
from tests.laws.cases import Vectors, unit

FLIPPED = 24


@pytest.fixture(scope="module")
def flipped() -> tuple[nn.Module, ImageSet, np.ndarray, np.ndarray, StoredDirections]:
    """Digits with 3 % of their labels flipped, and a model that fits nearly all of them."""
    clean = Digits(train_size=800).load(seeded(0, "data")).train
    rng = np.random.default_rng(0)
    wrong = np.zeros(len(clean), dtype=np.bool_)
    wrong[rng.choice(len(clean), FLIPPED, replace=False)] = True
    moved = (clean.labels + rng.integers(1, 10, len(clean))) % 10
    train = replace(clean, labels=np.where(wrong, moved, clean.labels))
    recipe = Recipe(epochs=25, batch_size=64, learning_rate=0.05)
    trainer = make_trainer(SmallCnn(), recipe, seed=0, stream="suspect", scratch=None)
    model = trainer.fit(train).model
    assert (predict(model, train) == train.labels)[wrong].mean() > 0.8
    factors = fit_factors(model, train, FactorSettings(), seeded(0, "fisher"))
    store = build_store(model, factors, train, DirectionSettings().store())
    return (
        model,
        train,
        wrong,
        clean.labels,
        StoredDirections.of(store, model, factors),
    )


def test_flipped_labels_rank_first_and_the_true_ones_are_suggested(flipped) -> None:
    model, train, wrong, true, directions = flipped
    doubts = doubt_labels(model, train, directions, seed=0)
    found = average_precision_score(wrong, doubts.doubt)
    assert found > 0.8  # 0.03 by chance
    assert found > average_precision_score(wrong, contradiction(train, directions, seed=0)[0])
    assert (doubts.suggested[wrong] == true[wrong]).mean() > 0.8
    assert wrong[doubts.doubtful(10)].mean() >= 0.9
    assert (doubts.suggested != train.labels).all()


def test_the_same_seed_gives_the_same_doubts(flipped) -> None:
    model, train, _, _, directions = flipped
    first, second = (doubt_labels(model, train, directions, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.doubt, second.doubt)
    np.testing.assert_array_equal(first.suggested, second.suggested)


def test_nobody_speaks_for_himself() -> None:
    cosines = np.array([[1.0, 0.2, 0.5], [0.2, 1.0, 0.4]], dtype=np.float32)
    found = support(cosines, np.array([0, 1]))
    np.testing.assert_allclose(found, [0.2, 0.2, 0.5], rtol=1e-6)


def test_classes_of_one_row_speak_for_nobody() -> None:
    images = make_images(40, seed=4)
    labels = np.where(np.arange(40) < 39, np.arange(40) % 2, 3)
    train = replace(images, labels=labels)
    vectors = unit(np.random.default_rng(0).normal(size=(40, 32)))
    against, suggested = contradiction(train, Vectors(vectors, {}), seed=0)
    assert np.isfinite(against).all()
    assert 3 not in suggested
    with pytest.raises(DataError, match="two or more classes with two rows, got 1"):
        contradiction(replace(images, labels=labels * 0), Vectors(vectors, {}), seed=0)


def test_sixteen_rows_of_another_class_speak_against_a_row_and_sixteen_of_its_own_for_it() -> None:
    images = make_images(120, seed=4)
    vectors = unit(np.random.default_rng(0).normal(size=(120, 32)))
    against, suggested = contradiction(images, Vectors(vectors, {}), seed=0)
    cosines = vectors @ vectors.T
    for row in range(120):
        means = {
            label: np.sort(cosines[row, (images.labels == label) & (np.arange(120) != row)])
            for label in range(4)
        }
        own = means.pop(int(images.labels[row]))[-16:].mean()
        opposed = {label: -values[:16].mean() for label, values in means.items()}
        assert against[row] == pytest.approx(max(opposed.values()) - own, abs=1e-5)
        assert suggested[row] == max(opposed, key=lambda label: opposed[label])


def test_a_row_that_others_are_compared_with_does_not_speak_for_itself(monkeypatch) -> None:
    """Rows have nothing to do with each other, and a few of them are what others are asked."""
    monkeypatch.setattr("defense.labels.FEWEST", 20)
    monkeypatch.setattr("defense.labels.REFERENCES", 80)
    against, _ = contradiction(make_images(160, seed=4), Vectors(np.eye(160), {}), seed=0)
    np.testing.assert_allclose(against, 0, atol=1e-6)


@dataclass(frozen=True)
class Weighed(Vectors):
    """Directions whose squared lengths are given, too."""

    lengths: np.ndarray | float = 1.0

    @property
    def self_influence(self) -> np.ndarray:
        return np.broadcast_to(self.lengths, len(self.given)).astype(np.float32)


def test_opposition_and_self_influence_of_the_loss_both_count(monkeypatch) -> None:
    images = make_images(80, seed=4)
    right = nn.functional.one_hot(images.targets(), 4) > 0

    def doubts(given: np.ndarray, lengths: np.ndarray | float, missing: np.ndarray) -> np.ndarray:
        part = torch.from_numpy(missing)[:, None]
        chances = torch.where(right, 1 - part, part / 3)
        monkeypatch.setattr("defense.labels.logits", lambda *_, **__: chances.log())
        return doubt_labels(nn.Identity(), images, Weighed(given, {}, lengths=lengths), 0).doubt

    rng, alike = np.random.default_rng(0), np.eye(80)
    opposed = unit(rng.normal(size=(80, 32)))
    known = doubts(opposed, 1.0, np.zeros(80))  # all labels by heart
    np.testing.assert_array_equal(
        np.argsort(-known, kind="stable"),
        np.argsort(-contradiction(images, Vectors(opposed, {}), 0)[0], kind="stable"),
    )
    lengths, missing = rng.uniform(1, 3, 80), rng.uniform(0.1, 0.9, 80)
    held = doubts(alike, lengths, missing)  # rows have nothing to do with each other
    np.testing.assert_array_equal(
        np.argsort(-held, kind="stable"), np.argsort(-(missing**2) * lengths, kind="stable")
    )
