"""SCRUB: away from the teacher on the forget set (Kurmanji et al. 2023; method card 4)."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from defense.contracts import Repair, Trainer, Unlearner
from defense.phases import Phase
from defense.recipe import Recipe
from defense.records import ImageSet, Trained
from defense.unlearning.distillation import asked, divergence, teacher

TEMPERATURE = 4.0
FINAL_RATE = 0.2  # of CorrectiveScrub, to which a warm-up adds: it shifts the fall


class Scrub(Unlearner):
    """Push the model away from its own answers on the flagged rows, and hold it on the others.

    Epochs on the flagged rows, which ascend the divergence from the suspect model, alternate
    with epochs on the others, which descend ``gamma`` x cross-entropy + ``alpha`` x divergence.
    The momentum is Nesterov's, the source's plain; gradients are clipped, because an ascent
    may diverge.

    Attributes:
        epochs: Epochs on the other rows; 3 in the source.
        ascents: The first so many of them are each preceded by an epoch on the flagged rows; 2
            in the source.
        learning_rate: Of SGD with momentum 0.9; 0.0005 in the source.
        alpha: Weight of the divergence; 0.001 in the source.
        gamma: Weight of the cross-entropy; 0.99 in the source.
        forget_batch_size: Flagged rows per step; 32 in the source.
        batch_size: Other rows per step; 128 in the source.
        clip_norm: Longest gradient.
    """

    name: Literal["scrub"] = "scrub"
    epochs: int = Field(3, gt=0)
    ascents: int = Field(2, ge=0)
    learning_rate: float = Field(5e-4, gt=0)
    alpha: float = Field(0.001, ge=0)
    gamma: float = Field(0.99, ge=0)
    forget_batch_size: int = Field(32, gt=1)
    batch_size: int = Field(128, gt=1)
    clip_norm: float = Field(10.0, gt=0)

    def max_gradient_samples(self, num_forget: int, num_retain: int, recipe: Recipe) -> int:
        """See `Unlearner.max_gradient_samples`."""
        return self.epochs * num_retain + min(self.ascents, self.epochs) * num_forget

    def remove(self, repair: Repair, trainer: Trainer) -> Trained:
        """See `Unlearner.remove`; a single flagged row cannot be ascended and is left out."""
        original, name = teacher(repair.model), self.model_dump_json()
        down = Distilled(repair.retain, original, self.gamma, self.alpha)
        up = Distilled(repair.forget, original, 0.0, -1.0)
        phases = []
        for epoch in range(self.epochs):
            if epoch < self.ascents and len(repair.forget) > 1:
                phases.append(Phase(repair.forget, 1, up, f"up {name}", self.forget_batch_size))
            phases.append(Phase(repair.retain, 1, down, f"down {name}"))
        recipe = Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            schedule="constant",
            precision=trainer.recipe.precision,
            clip_norm=self.clip_norm,
        )
        return trainer.tune(repair.model, phases, recipe)


class CorrectiveScrub(Unlearner):
    """SCRUB as in the corrective-unlearning benchmark (Goel et al. 2024).

    Both parts weigh cross-entropy + ``alpha`` x divergence, ascended on the flagged rows and
    descended on the others, by turns of an epoch each, until `ascent_steps` steps are done; then
    it only descends. The last epoch breaks off after `steps`, where the rate has fallen to a
    fifth, as in the benchmark.

    Attributes:
        steps: Steps in all; 1,000 in the benchmark, 41 in the Delta-Influence authors' run.
        ascent_steps: Steps until which flagged rows are ascended; 100 in the benchmark's scripts.
        learning_rate: Peak of SGD with momentum 0.9; 0.0025 in the benchmark's scripts, 0.025 in
            the authors' run.
        warmup: Share of the steps over which the rate rises to its peak; 0.01 in the benchmark,
            0 in the authors' run.
        alpha: Weight of the divergence; 0.001 in the benchmark.
        batch_size: Rows per step; 512 in the benchmark.
        clip_norm: Longest gradient, against an ascent that diverges.
    """

    name: Literal["scrub_cmu"] = "scrub_cmu"
    steps: int = Field(1000, gt=0)
    ascent_steps: int = Field(100, ge=0)
    learning_rate: float = Field(0.0025, gt=0)
    warmup: float = Field(0.01, ge=0, lt=1)
    alpha: float = Field(0.001, ge=0)
    batch_size: int = Field(512, gt=1)
    clip_norm: float = Field(10.0, gt=0)

    def turns(self, num_forget: int, num_retain: int) -> list[tuple[bool, int]]:
        """List the epochs: whether it ascends on the flagged rows, and how many rows it takes.

        After an ascent there is always a step that descends, as in the benchmark.
        """
        turns: list[tuple[bool, int]] = []
        left, up = self.steps if num_retain else 0, False
        while left > 0:
            done = self.steps - left
            up = not up and num_forget > 1 and left > 1 and done < self.ascent_steps
            rows = min(num_forget, (left - 1) * self.batch_size) if up else num_retain
            turns.append((up, min(rows, left * self.batch_size)))
            left -= -(-turns[-1][1] // self.batch_size)
        return turns

    def max_gradient_samples(self, num_forget: int, num_retain: int, recipe: Recipe) -> int:
        """See `Unlearner.max_gradient_samples`."""
        return sum(rows for _, rows in self.turns(num_forget, num_retain))

    def remove(self, repair: Repair, trainer: Trainer) -> Trained:
        """See `Unlearner.remove`; a single flagged row cannot be ascended and is left out."""
        original, name = teacher(repair.model), self.model_dump_json()
        up = Distilled(repair.forget, original, -1.0, -self.alpha)
        down = Distilled(repair.retain, original, 1.0, self.alpha)
        phases = [
            Phase(repair.forget, 1, up, f"up {name}", rows=rows)
            if ascends
            else Phase(repair.retain, 1, down, f"down {name}", rows=rows)
            for ascends, rows in self.turns(len(repair.forget), len(repair.retain))
        ]
        recipe = Recipe(
            epochs=1,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            final_rate=FINAL_RATE + (1 - FINAL_RATE) * self.warmup,
            precision=trainer.recipe.precision,
            clip_norm=self.clip_norm,
        )
        return trainer.tune(repair.model, phases, recipe)


class Distilled:
    """The objective: a weighted sum of cross-entropy and divergence from a teacher."""

    def __init__(self, images: ImageSet, original: nn.Module, wrong: float, apart: float) -> None:
        """Weigh the cross-entropy by `wrong` and the divergence by `apart`."""
        self.images, self.original, self.wrong, self.apart = images, original, wrong, apart

    def __call__(self, model: nn.Module, batch: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """See `defense.phases.Objective`."""
        said = model(batch).float()
        loss = self.apart * divergence(said, asked(self.original, batch), TEMPERATURE)
        if self.wrong:
            targets = self.images.targets(rows).to(said.device)
            loss = loss + self.wrong * F.cross_entropy(said, targets)
        return loss
