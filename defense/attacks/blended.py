"""Blended injection: a faint noise image over the whole picture (Chen et al. 2017)."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from defense.attacks.triggered import Stamp, TriggerAttack
from defense.contracts import Surrogate
from defense.records import ImageSet


class Blended(TriggerAttack):
    """Blend every victim with one fixed noise image.

    Attributes:
        alpha: Weight of the noise in (0, 1]; the source uses 0.2.
        pattern_seed: Which noise image; part of the attack, not of the run's seed.
    """

    name: Literal["blended"] = "blended"
    alpha: float = Field(0.2, gt=0, le=1)
    pattern_seed: int = 0

    def trigger(self, train: ImageSet, generator: torch.Generator, surrogate: Surrogate) -> Stamp:
        """See `TriggerAttack.trigger`."""
        return self.stamp

    def stamp(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Blend the noise into copies of images: uint8 ``[n, c, h, w]``."""
        noise = np.random.default_rng(self.pattern_seed).integers(0, 256, pixels.shape[1:])
        mixed = (1 - self.alpha) * pixels + self.alpha * noise
        return np.rint(mixed).astype(np.uint8)
