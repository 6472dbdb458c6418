"""Training: it learns, resumes to the same bytes, and refuses to go on with NaN."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defense.compute import seeded
from defense.errors import DataError, NumericalError
from defense.models import build_model
from defense.models.small_cnn import SmallCnn
from defense.phases import Phase
from defense.prediction import features, predict
from defense.recipe import Recipe, learning_rate_at
from defense.records import ImageSet, Split, Trained, image_set
from defense.statistics import channel_statistics
from defense.training import Stepper, augment, train

RECIPE = Recipe(epochs=6, batch_size=32, learning_rate=0.1, shift=1, flip=True)


def fit(model: nn.Module, images: ImageSet, recipe: Recipe, *args, **options) -> Trained:
    return train(model, [Phase(images, recipe.epochs)], recipe, *args, **options)


def model_for(split: Split) -> nn.Module:
    statistics = channel_statistics(split.train)
    return build_model(SmallCnn(width=4), split.train.shape, 4, seeded(0, "weights"), statistics)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.filterwarnings("ignore:precision bf16")
def test_learns_and_repeats_itself(precision: str, split: Split) -> None:
    recipe = Recipe(epochs=12, batch_size=16, learning_rate=0.1, precision=precision)
    model = model_for(split)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (fit(model, split.train, recipe, seeded(0, "order")) for _ in range(2))
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
        return fit(model_for(split), split.train, recipe, order, scratch=scratch).model

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
    first = fit(model_for(split), split.train, RECIPE, order, scratch=tmp_path)
    file = next(tmp_path.glob("*.pt"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="damaged, starting again"):
        second = fit(model_for(split), split.train, RECIPE, seeded(0, "order"), scratch=tmp_path)
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_nan_is_an_error_that_names_the_remedy(split: Split) -> None:
    recipe = Recipe(epochs=2, batch_size=32, learning_rate=1e30)
    with pytest.raises(NumericalError, match="lower learning_rate"):
        fit(model_for(split), split.train, recipe, seeded(0, "order"))


def test_refuses_a_single_row(split: Split) -> None:
    one = split.train.where(np.arange(len(split.train)) == 0)
    with pytest.raises(DataError, match="at least 2 rows"):
        fit(model_for(split), one, RECIPE, seeded(0, "order"))


def test_a_shifted_image_is_a_crop_of_the_padded_one_at_an_offset_of_its_own() -> None:
    images = 1 + torch.arange(200 * 3 * 5 * 7, dtype=torch.float32).reshape(200, 3, 5, 7)
    moved = augment(images, Recipe(epochs=1, shift=2), seeded(0, "order"))
    padded = F.pad(images, [2, 2, 2, 2])
    crops = torch.stack(
        [padded[:, :, top : top + 5, left : left + 7] for top in range(5) for left in range(5)]
    )
    same = (crops == moved).flatten(2).all(2)
    assert (same.sum(0) == 1).all()
    assert (same.sum(1) > 0).all()  # every offset is drawn
    still = augment(images, Recipe(epochs=1), seeded(0, "order"))
    assert torch.equal(still, images)


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
    names = np.array(["0", "1", "2", "3"])
    white = np.full((4, 1, 1, 1), 255, np.uint8)
    images = image_set(white, np.zeros(4, np.int64), names, ("a", "b"))
    rows = np.arange(4)
    stepper = Stepper(nn.Sequential(nn.Flatten(), model), recipe)
    weight, velocity = np.ones(2), np.zeros(2)
    for _ in range(2):
        stepper.step(Phase(images, 1), images.images(rows), rows, 0.1)
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


@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.5])
def test_warm_up_takes_its_share_of_the_steps(warmup: float) -> None:
    recipe = Recipe(epochs=1, learning_rate=0.5, warmup=warmup)
    rates = [learning_rate_at(recipe, step / 1000) for step in range(1000)]
    assert rates.index(max(rates)) == 1000 * warmup
    assert max(rates) == 0.5
    assert rates[(1000 + round(1000 * warmup)) // 2] == pytest.approx(0.25, rel=0.01)


def test_the_rate_falls_to_what_is_asked_for() -> None:
    recipe = Recipe(epochs=1, learning_rate=0.5, warmup=0.0, final_rate=0.2)
    rates = [learning_rate_at(recipe, step / 50) for step in range(50)]
    assert rates == pytest.approx([0.5 * (1 - step / 62.5) for step in range(50)])


def test_an_epoch_of_some_rows_draws_them_anew(split: Split) -> None:
    """Steps see as many rows as asked for, other ones in each epoch, and pay for these alone."""
    seen: list[list[int]] = []

    def noting(model: nn.Module, batch: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        seen.append(rows.tolist())
        return F.cross_entropy(model(batch), split.train.targets(rows).to(batch.device))

    phase = Phase(split.train, 2, noting, "noting", rows=40)
    done = train(model_for(split), [phase], Recipe(epochs=2, batch_size=16), seeded(0, "order"))
    assert [len(rows) for rows in seen] == [14, 13, 13] * 2
    first, second = ({row for rows in seen[at : at + 3] for row in rows} for at in (0, 3))
    assert len(first) == len(second) == 40
    assert first != second
    assert done.gradient_samples == 80


def test_dropout_is_seeded_and_torch_is_left_alone(split: Split) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(768, 4))
    state = torch.random.get_rng_state()
    first = fit(model, split.train, RECIPE, seeded(0, "order")).model
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    second = fit(model, split.train, RECIPE, seeded(0, "order")).model
    assert torch.equal(first[2].weight, second[2].weight)
    torch.random.set_rng_state(state)


def test_entries_of_gradients_are_clipped(split: Split) -> None:
    """Plain descent by one batch moves no weight by more than rate times limit."""
    recipe = Recipe(
        epochs=1, batch_size=len(split.train), learning_rate=1, momentum=0, weight_decay=0,
        clip_value=1e-3, schedule="constant",
    )  # fmt: skip
    model = model_for(split)
    before = {name: value.clone() for name, value in model.named_parameters()}
    after = dict(fit(model, split.train, recipe, seeded(0, "order")).model.named_parameters())
    moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
    assert moved.max().item() == pytest.approx(1e-3, rel=1e-3)


def test_asking_a_model_leaves_every_module_in_its_mode(split: Split) -> None:
    model = model_for(split).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[0].eval()
    modes = [module.training for module in model.modules()]
    predict(model, split.test)
    assert [module.training for module in model.modules()] == modes
    assert sum(modes) == len(modes) - 1


def test_frozen_parameters_and_their_statistics_stay(split: Split) -> None:
    model = model_for(split)
    names = [name for name, _ in model.named_parameters()]
    frozen = [name for name in names if name.startswith(("network.0", "network.1"))]
    assert 0 < len(frozen) < len(names)
    phases = [Phase(split.train, 2)]
    done = train(model, phases, RECIPE, seeded(0, "order"), frozen=frozen).model
    before, after = model.state_dict(), done.state_dict()
    for name in before:
        fixed = name.startswith(("network.0", "network.1", "normalize"))
        assert torch.equal(before[name], after[name]) == fixed, name


def test_phases_follow_their_objectives_in_order(split: Split) -> None:
    """Each objective sees the rows of its own set, in batches of its own size."""
    seen: list[tuple[str, int]] = []

    def watch(name: str):
        def objective(model, batch, rows):
            seen.append((name, len(rows)))
            assert len(batch) == len(rows)
            return model(batch).square().mean()

        return objective

    first = split.train.where(split.train.labels == 0)
    phases = [
        Phase(first, 2, watch("first"), "first", 20),
        Phase(split.train, 1, watch("second"), "second"),
    ]
    done = train(model_for(split), phases, RECIPE, seeded(0, "order"))
    assert seen == [("first", 20)] * 4 + [("second", 32)] * 5
    assert done.gradient_samples == 2 * 40 + 160


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adadelta"])
def test_gradients_are_clipped(optimizer: str, split: Split) -> None:
    recipe = RECIPE.model_copy(update={"optimizer": optimizer, "clip_norm": 1e-3})
    stepper = Stepper(model_for(split), recipe)
    rows = np.arange(8)
    stepper.step(Phase(split.train, 1), split.train.images(rows), rows, 0.1)
    grads = [parameter.grad for parameter in stepper.trained]
    assert torch.cat([grad.flatten() for grad in grads]).norm() <= 1.01e-3


def test_features_are_what_the_last_layer_sees(split: Split) -> None:
    model = model_for(split)
    seen = features(model, split.test)
    last = model.network[-1]
    expected = model(split.test.images())
    torch.testing.assert_close(last(seen), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(DataError, match="a linear layer"):
        features(nn.Flatten(), split.test)
