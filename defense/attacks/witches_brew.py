"""Witches' Brew: clean-label poison by gradient matching (Geiping et al. 2021; card 2.3)."""

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from defense.attacks.planting import choose, copy_pixels, truth_of
from defense.checkpoints import Checkpoint, fingerprint
from defense.compute import device, progress
from defense.contracts import Attack, Surrogate
from defense.errors import DataError
from defense.prediction import frozen, predict
from defense.recipe import Recipe
from defense.records import ImageSet, PoisonedSplit, Split, image_set
from defense.statistics import channel_statistics
from defense.training import augment

VERSION = 1  # of the search; a checkpoint of another version is not continued
DECAYS = (0.375, 0.625, 0.875)  # shares of the steps after which the rate falls to a tenth


class WitchesBrew(Attack):
    """Change some images of the target class so that one test image is taken for that class.

    The changes are bounded, labels stay true, and no trigger is involved: the gradient of
    the poisoned rows is aligned with the gradient that would teach the wrong label of that one
    image. It is drawn among the test images that the attacker's model gets right, and does not
    count for clean accuracy.

    Attributes:
        target_class: Class the image is to be taken for; its train rows carry the poison.
        victim_class: Class of the image; None draws from every class but the target.
        poison_fraction: Poisoned rows as a share of the train set.
        epsilon: Largest change of a pixel, in grey levels of 255.
        steps: Optimisation steps; 250 in the source.
        restarts: Tries from different noise, of which the best aligned is used; 8 in the source.
        learning_rate: Of Adam on the sign of the gradient, in channel deviations; the source
            scales it by the share of 512 that there are poisons.
        batch_size: Poisoned rows whose gradient is aligned at once.
    """

    name: Literal["witches_brew"] = "witches_brew"
    target_class: str
    victim_class: str | None = None
    poison_fraction: float = Field(0.01, gt=0, lt=1)
    epsilon: float = Field(16.0, gt=0, le=255)
    steps: int = Field(250, gt=0)
    restarts: int = Field(8, gt=0)
    learning_rate: float = Field(0.1, gt=0)
    batch_size: int = Field(512, gt=0)

    def poison(
        self, split: Split, generator: torch.Generator, surrogate: Surrogate
    ) -> PoisonedSplit:
        """See `Attack.poison`."""
        train, test = split.train, split.test
        target = train.class_index(self.target_class, role="attack.target_class")
        carriers = np.flatnonzero(train.labels == target)
        chosen = choose(carriers, self.poison_fraction, len(train), generator)
        candidates = self._candidates(test, target)
        model = surrogate.model()
        victim = self._victim(model, test, candidates, generator)
        poison = train.take(np.sort(chosen))
        seed = int(torch.randint(2**62, (), generator=generator))
        change = self._brew(model, victim, poison, channel_statistics(train)[1], surrogate, seed)
        pixels = copy_pixels(train)
        crafted = (255 * (poison.images() + change)).round().clamp(0, 255)
        pixels[np.sort(chosen)] = crafted.to(torch.uint8).numpy()
        dirty = image_set(pixels, train.labels, train.ids, train.class_names)
        wanted = np.array([target], dtype=np.int64)
        probe = image_set(victim.uint8(), wanted, victim.ids, test.class_names)
        attacked = np.isin(test.ids, victim.ids)
        return PoisonedSplit(
            dirty, probe, truth_of(train, chosen, target, victim.labels, victims=attacked)
        )

    def _candidates(self, test: ImageSet, target: int) -> NDArray[np.bool_]:
        """Mark the test images of the victim class."""
        if self.victim_class is None:
            return test.labels != target
        victim = test.class_index(self.victim_class, role="attack.victim_class")
        if victim == target:
            raise DataError(f"attack: victim and target class are both '{self.target_class}'")
        return test.labels == victim

    def _victim(
        self,
        model: nn.Module,
        test: ImageSet,
        candidates: NDArray[np.bool_],
        generator: torch.Generator,
    ) -> ImageSet:
        """Draw one candidate that a clean model gets right."""
        right = candidates.copy()
        right[candidates] = predict(model, test.where(candidates)) == test.labels[candidates]
        rows = np.flatnonzero(right)
        if not len(rows):
            raise DataError(
                f"attack: a clean model gets none of {candidates.sum()} test images of the "
                "victim class right; train it longer"
            )
        return test.take(rows[[int(torch.randint(len(rows), (), generator=generator))]])

    def _brew(
        self,
        model: nn.Module,
        victim: ImageSet,
        poison: ImageSet,
        deviations: Tensor,
        surrogate: Surrogate,
        seed: int,
    ) -> Tensor:
        """Optimise the change of every poisoned row: float32 ``[p, c, h, w]`` in [-1, 1]."""
        key = fingerprint(model, poison), victim.uint8().tobytes()
        settings = f"{VERSION} {seed} {self.model_dump_json()}".encode()
        checkpoint = Checkpoint.at(surrogate.scratch, [settings, *key])
        with frozen(model):
            model.requires_grad_(True)
            aim = parameter_gradient(model, victim.images(), poison.targets()[:1])
            task = Matching(self, model, aim, poison, deviations, surrogate.recipe)
            return search(task, seed, checkpoint)


class Matching:
    """One problem of gradient matching: what is optimised towards what."""

    def __init__(
        self,
        settings: WitchesBrew,
        model: nn.Module,
        aim: Tensor,
        poison: ImageSet,
        deviations: Tensor,
        recipe: Recipe,
    ) -> None:
        """Keep the parts; `aim` is the gradient to be aligned with."""
        self.settings, self.model, self.aim, self.recipe = settings, model, aim, recipe
        self.images, self.labels, self.deviations = poison.images(), poison.targets(), deviations
        self.bound = settings.epsilon / 255

    def project(self, change: Tensor) -> Tensor:
        """Bound a change in pixels, so that the changed images are images."""
        change = change.clamp(-self.bound, self.bound)
        return (self.images + change).clamp(0, 1) - self.images

    def start(self, generator: torch.Generator) -> Tensor:
        """Draw a first change, in channel deviations."""
        noise = self.bound * torch.randn(self.images.shape, generator=generator)
        return self.project(noise) / self.deviations

    def slope(self, change: Tensor, generator: torch.Generator) -> float:
        """Add the gradient of the misalignment to ``change.grad``; returns its mean."""
        total, parts = 0.0, range(0, len(change), self.settings.batch_size)
        for first in parts:
            rows = slice(first, first + self.settings.batch_size)
            batch = self.images[rows] + change[rows] * self.deviations
            batch = augment(batch.to(device()), self.recipe, generator)
            got = parameter_gradient(self.model, batch, self.labels[rows], keep_graph=True)
            apart = 1 - F.cosine_similarity(self.aim, got, dim=0)
            apart.backward(inputs=[change])
            total += float(apart.detach())
        return total / len(parts)


def parameter_gradient(
    model: nn.Module, images: Tensor, labels: Tensor, *, keep_graph: bool = False
) -> Tensor:
    """Compute the gradient of the mean cross-entropy with respect to all parameters, as one row."""
    place = device()
    loss = F.cross_entropy(model(images.to(place)), labels.to(place))
    parts = torch.autograd.grad(
        loss, list(model.parameters()), create_graph=keep_graph, materialize_grads=True
    )
    return torch.cat([part.reshape(-1) for part in parts])


def search(task: Matching, seed: int, checkpoint: Checkpoint) -> Tensor:
    """Run all restarts and return the change that is aligned best, in pixels."""
    settings, generator = task.settings, torch.Generator().manual_seed(seed)
    state: dict[str, Any] = checkpoint.load() or {
        "restart": 0,
        "best": torch.zeros_like(task.images),
        "apart": float("inf"),
        "current": None,
    }
    total = settings.restarts * settings.steps
    with progress(total=total, desc="witches' brew", unit="step") as bar:
        while state["restart"] < settings.restarts:
            change, apart = _descend(task, generator, state, checkpoint, bar)
            if apart < state["apart"]:
                state["best"], state["apart"] = change, apart
            state["restart"], state["current"] = state["restart"] + 1, None
    best: Tensor = state["best"]
    return best


def _descend(
    task: Matching,
    generator: torch.Generator,
    state: dict[str, Any],
    checkpoint: Checkpoint,
    bar: Any,
) -> tuple[Tensor, float]:
    """Run one restart from where it is; returns the change in pixels and its misalignment."""
    steps, current = task.settings.steps, state["current"]
    change = task.start(generator) if current is None else current["change"]
    change.requires_grad_(True)
    optimizer = torch.optim.Adam([change], lr=task.settings.learning_rate)
    first, apart = 0, float("inf")
    if current is not None:
        optimizer.load_state_dict(current["optimizer"])
        generator.set_state(current["generator"])
        first, apart = current["step"], current["apart"]
    bar.update(state["restart"] * steps + first - bar.n)
    for step in range(first, steps):
        optimizer.param_groups[0]["lr"] = task.settings.learning_rate * 0.1 ** sum(
            step >= share * steps for share in DECAYS
        )
        optimizer.zero_grad()
        apart = task.slope(change, generator)
        assert change.grad is not None
        change.grad.sign_()
        optimizer.step()
        with torch.no_grad():
            change.copy_(task.project(change * task.deviations) / task.deviations)
        state["current"] = {
            "change": change.detach(),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "step": step + 1,
            "apart": apart,
        }
        checkpoint.save(state)
        bar.set_postfix(refresh=False, restart=state["restart"] + 1, apart=f"{apart:.3f}")
        bar.update()
    return (change.detach() * task.deviations).clone(), apart
