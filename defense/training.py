"""Training: one loop for suspect models, retraining, fine-tuning, unlearning."""

import copy
import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from defense.checkpoints import Checkpoint, digest_of_images, digest_of_model
from defense.compute import device, has_bf16, progress, repeatable
from defense.errors import DataError, NumericalError
from defense.phases import Phase
from defense.recipe import Recipe, learning_rate_at
from defense.records import Trained

VERSION = 2  # of the loop below; a checkpoint of another version is not continued


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Mirror and shift every image at random, where it is: ``[n, c, h, w]`` to the same shape."""
    count, channels, height, width = images.shape
    if recipe.flip:
        chosen = torch.rand(count, generator=generator).to(images.device) < 0.5
        images = torch.where(chosen[:, None, None, None], images.flip(3), images)
    if recipe.shift:
        shift = recipe.shift
        padded = F.pad(images, [shift] * 4)
        offsets = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
        top, left = offsets.to(images.device)
        rows = top + torch.arange(height, device=images.device)
        columns = left + torch.arange(width, device=images.device)
        pixels = rows[:, None, :, None] * padded.shape[3] + columns[:, None, None, :]
        taken = pixels.flatten(2).expand(-1, channels, -1)  # numbers within an image, row by row
        images = padded.flatten(2).gather(2, taken).view(count, channels, height, width)
    return images


class Stepper:
    """A model in training: the working copy, its fp32 master weights and the optimiser."""

    def __init__(self, model: nn.Module, recipe: Recipe, frozen: Collection[str] = ()) -> None:
        """Copy `model` to the device; it stays as it is."""
        place = device()
        self.recipe, self.place = recipe, place
        self.work = copy.deepcopy(model).to(place).to(memory_format=torch.channels_last)
        self.work.train().requires_grad_(True)
        _freeze(self.work, frozen)
        self.master = self._lower(self.work) if recipe.precision == "bf16" else []
        masters = {id(low): high for low, high in self.master}
        trained = [p for p in self.work.parameters() if p.requires_grad]
        self.trained = [masters.get(id(p), p) for p in trained]
        self.optimizer = _optimizer(self.trained, recipe)

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

    def step(
        self, phase: Phase, batch: Tensor, rows: NDArray[np.int64], learning_rate: float
    ) -> Tensor:
        """Take one step on a batch; returns the mean loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        batch = batch.to(self.place, memory_format=torch.channels_last)
        with repeatable():
            loss = phase.loss(self.work, batch, rows)
            self.work.zero_grad(set_to_none=True)
            loss.backward()
        for low, high in self.master:
            high.grad = None if low.grad is None else low.grad.float()
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self.recipe.clip_norm)
        if self.recipe.clip_value is not None:
            nn.utils.clip_grad_value_(self.trained, self.recipe.clip_value)
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


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    rate, decay, momentum = recipe.learning_rate, recipe.weight_decay, recipe.momentum
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, rate, weight_decay=decay)
    if recipe.optimizer == "adadelta":
        return torch.optim.Adadelta(parameters, rate, weight_decay=decay)
    return torch.optim.SGD(parameters, rate, momentum, weight_decay=decay, nesterov=momentum > 0)


def _freeze(model: nn.Module, names: Collection[str]) -> None:
    """Fix parameters, and the statistics of modules all of whose parameters are fixed."""
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(prefix, recurse=False))
        fixed = own.keys() & set(names)
        for name in fixed:
            own[name].requires_grad_(False)
        if own and len(fixed) == len(own):
            module.eval()


def train(
    model: nn.Module,
    phases: Sequence[Phase],
    recipe: Recipe,
    generator: torch.Generator,
    *,
    frozen: Collection[str] = (),
    scratch: Path | None = None,
    label: str = "train",
) -> Trained:
    """Train a copy of a model.

    Args:
        model: Where to start; it stays as it is.
        phases: What is trained on, one after the other; the schedule runs over all of them.
        recipe: How to train; the phases say how many epochs.
        generator: The only source of randomness (order, augmentation).
        frozen: Names of parameters that keep their values.
        scratch: Folder for the checkpoint that makes a killed training resumable, to be deleted
            when the result is written.
        label: Text of the progress bar.

    Returns:
        The trained model, in eval mode on the CPU, and its cost.

    Raises:
        DataError: A phase has fewer than two rows.
        NumericalError: The loss became NaN or infinite.
    """
    for phase in phases:
        if phase.num_rows < 2:
            raise DataError(f"expected at least 2 rows to {label} on, got {phase.num_rows}")
    stepper = Stepper(model, recipe, frozen)
    parts = (
        recipe.model_dump_json().encode(),
        repr([(p.epochs, p.name, p.batch_size, p.rows) for p in phases]).encode(),
        digest_of_model(model),
        *(digest_of_images(phase.images) for phase in phases),
        repr(sorted(frozen)).encode(),
        str(VERSION).encode(),
        generator.get_state().numpy().tobytes(),
    )
    checkpoint = Checkpoint.at(scratch, parts)
    _epochs(stepper, phases, generator, checkpoint, label)
    trained = copy.deepcopy(model).cpu()
    trained.load_state_dict(stepper.weights())
    return Trained(trained.eval(), sum(phase.num_gradients for phase in phases))


def _epochs(
    stepper: Stepper,
    phases: Sequence[Phase],
    generator: torch.Generator,
    checkpoint: Checkpoint,
    label: str,
) -> None:
    """Run all epochs that the checkpoint does not hold yet."""
    recipe, state = stepper.recipe, checkpoint.load()
    epochs = [phase for phase in phases for _ in range(phase.epochs)]
    steps = np.cumsum([0, *(phase.steps(recipe) for phase in epochs)]).tolist()
    first = 0
    if state is not None:
        stepper.restore(state["weights"], state["optimizer"])
        generator.set_state(state["generator"])
        first = state["epochs"]
    with progress(total=steps[-1], initial=steps[first], desc=label, unit="step") as bar:
        for epoch in range(first, len(epochs)):
            shares = np.arange(steps[epoch], steps[epoch + 1]) / steps[-1]
            with _own_randomness(stepper.place, generator.initial_seed() + epoch):
                loss = _epoch(stepper, epochs[epoch], generator, shares, bar)
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


@contextmanager
def _own_randomness(place: torch.device, seed: int) -> Iterator[None]:
    """Seed what draws from torch's global generator, such as dropout, and leave that alone."""
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _epoch(
    stepper: Stepper,
    phase: Phase,
    generator: torch.Generator,
    shares: NDArray[np.float64],
    bar: tqdm,
) -> float:
    """Run one epoch, each step at its share of all steps; returns the mean loss."""
    recipe, images = stepper.recipe, phase.images
    order = torch.randperm(len(images), generator=generator).numpy()[: phase.num_rows]
    total = torch.zeros((), device=stepper.place)
    for rows, share in zip(np.array_split(order, len(shares)), shares, strict=True):
        batch = augment(images.images(rows).to(stepper.place), recipe, generator)
        loss = stepper.step(phase, batch, rows, learning_rate_at(recipe, float(share)))
        total += loss * len(rows)  # stays on the device: no step waits for it
        bar.update()
    return float(total) / len(order)


def all_but_last(model: nn.Module, count: int) -> list[str]:
    """Name the parameters before the last `count` convolutions and linear layers.

    Raises:
        DataError: There are fewer layers.
    """
    names = [name for name, _ in model.named_parameters()]
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
    ]
    if count > len(layers):
        raise DataError(f"expected a model of at least {count} layers, got one of {len(layers)}")
    first = next(i for i, name in enumerate(names) if name.startswith(f"{layers[-count]}."))
    return names[:first]
