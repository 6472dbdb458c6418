"""Phases: what is trained on, for how long, and towards what."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from defense.recipe import Recipe
from defense.records import ImageSet

Objective = Callable[[nn.Module, Tensor, NDArray[np.int64]], Tensor]


@dataclass(frozen=True)
class Phase:
    """Epochs on one set under one objective.

    Attributes:
        images: What is trained on.
        epochs: Passes over it.
        objective: From the model in training, a batch ``[b, c, h, w]`` on the device and the
            batch's row numbers in `images` to a loss that is descended; None is the
            cross-entropy with the labels.
        name: Says everything about the objective that matters, for the checkpoint's key.
        batch_size: Rows per step; None takes the recipe's.
        rows: Rows of an epoch, drawn anew for each; None is all.
    """

    images: ImageSet
    epochs: int
    objective: Objective | None = None
    name: str = "cross-entropy"
    batch_size: int | None = None
    rows: int | None = None

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self.images) if self.rows is None else min(self.rows, len(self.images))

    @property
    def num_gradients(self) -> int:
        """Per-sample gradients it takes."""
        return self.epochs * self.num_rows

    def steps(self, recipe: Recipe) -> int:
        """Steps per epoch."""
        return -(-self.num_rows // (self.batch_size or recipe.batch_size))

    def loss(self, model: nn.Module, batch: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """Evaluate the objective."""
        if self.objective is not None:
            return self.objective(model, batch, rows)
        return F.cross_entropy(model(batch).float(), self.images.targets(rows).to(batch.device))
