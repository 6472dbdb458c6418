"""Training: it learns, resumes to the same bytes, and refuses to go on with NaN."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from defense.compute import seeded
from defense.errors import DataError, NumericalError
from defense.models import build_model, channel_statistics
from defense.models.small_cnn import SmallCnn
from defense.recipe import Recipe, learning_rate_at
from defense.records import Split
from defense.training import Stepper, augment, predict, train

RECIPE = Recipe(epochs=6, batch_size=32, learning_rate=0.1, shift=1, flip=True)


def model_for(split: Split) -> nn.Module:
    statistics = channel_statistics(split.train)
    return build_model(SmallCnn(width=4), split.train.shape, 4, seeded(0, "weights"), statistics)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.filterwarnings("ignore:precision bf16")
def test_learns_and_repeats_itself(precision: str, split: Split) -> None:
    recipe = Recipe(epochs=12, batch_size=16, learning_rate=0.1, precision=precision)
    model = model_for(split)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (train(model, split.train, recipe, seeded(0, "order")) for _ in range(2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    states = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(p.dtype == torch.float32 for p in first.model.parameters())
    assert (predict(first.model, split.test) == split.test.labels).mean() > 0.9
    assert first.gradient_samples == 12 * len(split.train)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.filterwarnings("ignore:precision bf16")
def test_a_killed_training_resumes_to_the_same_bytes(
    precision: str, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("defense.checkpoints.CHECKPOINT_SECONDS", 0.0)
    recipe = RECIPE.model_copy(update={"precision": precision})

    def run(scratch: Path | None):
        order = seeded(0, "order")
        return train(model_for(split), split.train, recipe, order, scratch=scratch).model

    whole = run(None).state_dict()
    step, calls = Stepper.step, 0

    def dying_step(self, *args):
        nonlocal calls
        calls += 1
        if calls == 18:
            raise Killed
        return step(self, *args)

    monkeypatch.setattr(Stepper, "step", dying_step)
    with pytest.raises(Killed):
        run(tmp_path)
    assert len(list(tmp_path.glob("*.pt"))) == 1
    resumed, before = run(tmp_path).state_dict(), calls
    assert before < 18 + 30  # the finished epochs were not repeated
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_damaged_checkpoint_is_not_used(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("defense.checkpoints.CHECKPOINT_SECONDS", 0.0)
    order = seeded(0, "order")
    first = train(model_for(split), split.train, RECIPE, order, scratch=tmp_path)
    file = next(tmp_path.glob("*.pt"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="damaged, starting again"):
        second = train(model_for(split), split.train, RECIPE, seeded(0, "order"), scratch=tmp_path)
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_nan_is_an_error_that_names_the_remedy(split: Split) -> None:
    recipe = Recipe(epochs=2, batch_size=32, learning_rate=1e30)
    with pytest.raises(NumericalError, match="lower learning_rate"):
        train(model_for(split), split.train, recipe, seeded(0, "order"))


def test_refuses_a_single_row(split: Split) -> None:
    one = split.train.where(np.arange(len(split.train)) == 0)
    with pytest.raises(DataError, match="at least 2 rows"):
        train(model_for(split), one, RECIPE, seeded(0, "order"))


def test_augmentation_moves_pixels_and_keeps_them(split: Split) -> None:
    images = split.train.images(np.arange(8))
    moved = augment(images, RECIPE, seeded(0, "order"))
    assert moved.shape == images.shape
    assert not torch.equal(moved, images)
    still = augment(images, Recipe(epochs=1), seeded(0, "order"))
    assert torch.equal(still, images)
    inner = images[:, :, 1:-1, 1:-1].sum((1, 2, 3))
    assert (moved.sum((1, 2, 3)) >= inner - 1e-3).all()


def test_flip_mirrors_half_of_the_images() -> None:
    images = torch.arange(400 * 6, dtype=torch.float32).reshape(400, 1, 2, 3)
    turned = augment(images, Recipe(epochs=1, flip=True), seeded(0, "order"))
    mirrored = (turned == images.flip(3)).all(dim=3).all(dim=2).squeeze(1)
    kept = (turned == images).all(dim=3).all(dim=2).squeeze(1)
    assert (mirrored | kept).all()
    assert 150 < int(mirrored.sum()) < 250


def test_a_step_is_sgd_with_nesterov_momentum_and_weight_decay() -> None:
    """Two steps of one weight, by hand: w = 1, gradient of the loss is known to autograd."""
    recipe = Recipe(epochs=1, learning_rate=0.1, momentum=0.9, weight_decay=0.5)
    model = nn.Linear(1, 2, bias=False)
    nn.init.constant_(model.weight, 1.0)
    images, targets = torch.ones(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64)
    stepper = Stepper(nn.Sequential(nn.Flatten(), model), recipe)
    weight, velocity = np.ones(2), np.zeros(2)
    for _ in range(2):
        stepper.step(images, targets, 0.1)
        share = np.exp(weight) / np.exp(weight).sum()
        gradient = share - np.array([1.0, 0.0]) + 0.5 * weight
        velocity = 0.9 * velocity + gradient
        weight = weight - 0.1 * (gradient + 0.9 * velocity)
    found = next(iter(stepper.weights().values()))[:, 0].numpy()
    np.testing.assert_allclose(found, weight, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["triangle", "cosine", "steps", "constant"])
def test_schedules_stay_below_the_peak(schedule: str) -> None:
    recipe = Recipe(epochs=1, learning_rate=0.5, schedule=schedule)
    rates = [learning_rate_at(recipe, step / 100) for step in range(100)]
    assert max(rates) == pytest.approx(0.5, rel=0.02)
    assert min(rates) > 0
    assert schedule == "constant" or rates[-1] < 0.02
