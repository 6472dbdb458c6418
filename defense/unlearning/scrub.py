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


class Scrub(Unlearner):
    """Push the model away from its own answers on the flagged rows, and hold it on the others.

    Epochs on the flagged rows, which ascend, alternate with epochs on the others, which
    descend on ``gamma`` x cross-entropy + ``alpha`` x divergence from the suspect model.

    Attributes:
        variant: ``official`` ascends the divergence; ``cmu`` ascends cross-entropy + ``alpha``
            x divergence, as the benchmark of Goel et al. 2024 does.
        epochs: Epochs on the retain set; 3 in the source.
        ascents: The first so many of them are each preceded by an epoch on the forget set; 2 in
            the source.
        learning_rate: Of SGD with momentum 0.9; 0.0005 in the source, 0.0025 or 0.025 in the
            benchmark.
        alpha: Weight of the divergence; 0.001 in the source.
        gamma: Weight of the cross-entropy; 0.99 in the source.
        forget_batch_size: Flagged rows per step; 32 in the source.
        batch_size: Other rows per step; 128 in the source.
        clip_norm: Longest gradient, against an ascent that diverges.
    """

    name: Literal["scrub"] = "scrub"
    variant: Literal["official", "cmu"] = "official"
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
        original = teacher(repair.model)
        recipe = Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            schedule="constant",
            clip_norm=self.clip_norm,
        )
        phases = []
        for epoch in range(self.epochs):
            if epoch < self.ascents and len(repair.forget) > 1:
                phases.append(self._phase(repair.forget, original, ascend=True))
            phases.append(self._phase(repair.retain, original, ascend=False))
        return trainer.tune(repair.model, phases, recipe)

    def _phase(self, images: ImageSet, original: nn.Module, *, ascend: bool) -> Phase:
        """Build one epoch."""

        def objective(model: nn.Module, batch: Tensor, rows: NDArray[np.int64]) -> Tensor:
            said = model(batch).float()
            apart = divergence(said, asked(original, batch), TEMPERATURE)
            if ascend and self.variant == "official":
                return -apart
            wrong = F.cross_entropy(said, images.targets(rows).to(said.device))
            if ascend:
                return -(wrong + self.alpha * apart)
            return self.gamma * wrong + self.alpha * apart

        size = self.forget_batch_size if ascend else self.batch_size
        return Phase(images, 1, objective, f"{self.model_dump_json()} {ascend}", size)
