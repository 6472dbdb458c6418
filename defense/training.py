"""Training and prediction: one loop for suspect models, retraining and fine-tuning."""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from defense.checkpoints import Checkpoint, fingerprint
from defense.compute import batches, device, has_bf16, progress
from defense.errors import DataError, NumericalError
from defense.recipe import Recipe, learning_rate_at
from defense.records import ImageSet, Trained

PREDICT_BATCH = 500
VERSION = 1  # of the loop below; a checkpoint of another version is not continued


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Mirror and shift every image at random: ``[n, c, h, w]`` to the same shape."""
    count, _, height, width = images.shape
    if recipe.flip:
        chosen = torch.rand(count, generator=generator) < 0.5
        images = torch.where(chosen[:, None, None, None], images.flip(3), images)
    if recipe.shift:
        shift = recipe.shift
        padded = F.pad(images, [shift] * 4)
        top, left = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
        rows = (top + torch.arange(height))[:, None, :, None]
        columns = (left + torch.arange(width))[:, None, None, :]
        channels = torch.arange(images.shape[1])[None, :, None, None]
        images = padded[torch.arange(count)[:, None, None, None], channels, rows, columns]
    return images


class Stepper:
    """A model in training: the working copy, its fp32 master weights and the optimiser."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        """Copy `model` to the device; it stays as it is."""
        place = device()
        self.recipe, self.place = recipe, place
        self.work = copy.deepcopy(model).to(place).to(memory_format=torch.channels_last)
        self.work.train().requires_grad_(True)
        self.master = self._lower(self.work) if recipe.precision == "bf16" else []
        masters = {id(low): high for low, high in self.master}
        self.optimizer = torch.optim.SGD(
            [masters.get(id(p), p) for p in self.work.parameters()],
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            nesterov=recipe.momentum > 0,
            weight_decay=recipe.weight_decay,
        )

    def _lower(self, model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Turn convolutions and linear layers to bf16; returns (bf16, fp32 master) pairs."""
        if not has_bf16(self.place):
            warnings.warn("precision bf16: this hardware has no bf16, expect no gain", stacklevel=2)
        pairs = []
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_pre_hook(_cast_input)
                for parameter in layer.parameters(recurse=False):
                    master = nn.Parameter(parameter.detach().clone())
                    parameter.data = parameter.data.bfloat16()
                    pairs.append((parameter, master))
        return pairs

    def step(self, images: Tensor, targets: Tensor, learning_rate: float) -> Tensor:
        """Take one SGD step; returns the mean loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        images = images.to(self.place, memory_format=torch.channels_last)
        loss = F.cross_entropy(self.work(images).float(), targets.to(self.place))
        self.work.zero_grad(set_to_none=True)
        loss.backward()
        for low, high in self.master:
            high.grad = None if low.grad is None else low.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for low, high in self.master:
                low.copy_(high)
        return loss.detach()

    def weights(self) -> dict[str, Tensor]:
        """Return weights and buffers in fp32 on the CPU."""
        masters = {id(low): high for low, high in self.master}
        named = dict(self.work.named_parameters())
        return {
            name: masters.get(id(named.get(name)), value).detach().cpu().clone()
            for name, value in self.work.state_dict().items()
        }

    def restore(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Continue from saved weights and optimiser state."""
        self.work.load_state_dict(weights)
        named = {id(p): name for name, p in self.work.named_parameters()}
        with torch.no_grad():
            for low, high in self.master:
                high.copy_(weights[named[id(low)]])
        self.optimizer.load_state_dict(optimizer)


def _cast_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return (inputs[0].to(weight.dtype), *inputs[1:])


def train(
    model: nn.Module,
    images: ImageSet,
    recipe: Recipe,
    generator: torch.Generator,
    *,
    scratch: Path | None = None,
    label: str = "train",
) -> Trained:
    """Train a copy of a model.

    Args:
        model: Where to start; it stays as it is.
        images: The training set.
        recipe: How to train.
        generator: The only source of randomness (order, augmentation).
        scratch: Folder for the checkpoint that makes a killed training resumable, to be deleted
            when the result is written.
        label: Text of the progress bar.

    Returns:
        The trained model, in eval mode on the CPU, and its cost.

    Raises:
        DataError: There are fewer than two rows.
        NumericalError: The loss became NaN or infinite.
    """
    if len(images) < 2:
        raise DataError(f"expected at least 2 rows to {label} on, got {len(images)}")
    stepper = Stepper(model, recipe)
    checkpoint = Checkpoint.at(
        scratch,
        recipe.model_dump_json().encode(),
        fingerprint(model, images),
        str(VERSION).encode(),
        generator.get_state().numpy().tobytes(),
    )
    _epochs(stepper, images, generator, checkpoint, label)
    trained = copy.deepcopy(model).cpu()
    trained.load_state_dict(stepper.weights())
    return Trained(trained.eval(), recipe.epochs * len(images))


def _epochs(
    stepper: Stepper,
    images: ImageSet,
    generator: torch.Generator,
    checkpoint: Checkpoint,
    label: str,
) -> None:
    """Run all epochs that the checkpoint does not hold yet."""
    recipe, state = stepper.recipe, checkpoint.load()
    first = 0
    if state is not None:
        stepper.restore(state["weights"], state["optimizer"])
        generator.set_state(state["generator"])
        first = state["epochs"]
    steps = -(-len(images) // recipe.batch_size)
    total = recipe.epochs * steps
    with progress(total=total, initial=first * steps, desc=label, unit="step") as bar:
        for epoch in range(first, recipe.epochs):
            loss = _epoch(stepper, images, generator, epoch / recipe.epochs, bar)
            if not math.isfinite(loss):
                raise NumericalError(
                    f"the loss of {label} is {loss} in epoch {epoch + 1}; "
                    f"lower learning_rate (now {recipe.learning_rate:g})"
                )
            bar.set_postfix(refresh=False, epoch=epoch + 1, loss=f"{loss:.3f}")
            checkpoint.save(
                {
                    "weights": stepper.weights(),
                    "optimizer": stepper.optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "epochs": epoch + 1,
                }
            )


def _epoch(
    stepper: Stepper, images: ImageSet, generator: torch.Generator, start: float, bar: tqdm
) -> float:
    """Run one epoch; returns the mean loss."""
    recipe = stepper.recipe
    order = torch.randperm(len(images), generator=generator).numpy()
    steps = -(-len(images) // recipe.batch_size)
    total = torch.zeros(())
    for number, rows in enumerate(np.array_split(order, steps)):
        batch = augment(images.images(rows), recipe, generator)
        share = start + number / (steps * recipe.epochs)
        loss = stepper.step(batch, images.targets(rows), learning_rate_at(recipe, share))
        total = total + loss.cpu() * len(rows)
        bar.update()
    return float(total) / len(images)


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model on the device in eval mode without parameter gradients; undo it after."""
    training = model.training
    required = [parameter.requires_grad for parameter in model.parameters()]
    try:
        yield model.to(device()).eval().requires_grad_(False)
    finally:
        for parameter, wanted in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(wanted)
        model.cpu().train(training)


@torch.no_grad()
def logits(model: nn.Module, images: ImageSet, *, label: str = "predict") -> Tensor:
    """Compute the logits of every image: float32 ``[n, k]`` on the CPU."""
    with frozen(model):
        parts = [
            model(images.images(rows).to(device())).float().cpu()
            for rows in batches(len(images), PREDICT_BATCH, label=label)
        ]
    return torch.cat(parts) if parts else torch.zeros(0, images.num_classes)


def predict(model: nn.Module, images: ImageSet, *, label: str = "predict") -> np.ndarray:
    """Predict the class of every image: int64 ``[n]``."""
    return logits(model, images, label=label).argmax(1).numpy()
