"""BadNets: a small patch in a corner (Gu et al. 2017; method card 2.1)."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from defense.attacks.triggered import Stamp, TriggerAttack
from defense.contracts import Surrogate
from defense.errors import DataError
from defense.records import ImageSet

CHECKER = ((-4, -2), (-2, -2), (-3, -3), (-2, -4))


class BadNets(TriggerAttack):
    """Set a patch near a corner to one value in all channels.

    Attributes:
        pattern: ``checker``: the four pixels the Delta-Influence authors set; ``square``:
            all pixels of a square (theirs on 160-pixel Imagenette has a size of 22).
        corner: Where the patch lies; the pattern is mirrored, so that its distance to the
            borders stays.
        size: Side of the square in pixels; only for ``square``.
        margin: Pixels between the square and the border; only for ``square``.
        value: Brightness of the patch in [0, 1]; 0 is black.
    """

    name: Literal["badnets"] = "badnets"
    pattern: Literal["checker", "square"] = "checker"
    corner: Literal["lower_right", "lower_left", "upper_right", "upper_left"] = "lower_right"
    size: int = Field(3, gt=0)
    margin: int = Field(1, ge=0)
    value: float = Field(0.0, ge=0, le=1)

    def trigger(self, train: ImageSet, generator: torch.Generator, surrogate: Surrogate) -> Stamp:
        """See `TriggerAttack.trigger`."""
        return self.stamp

    def stamp(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Put the patch on copies of images: uint8 ``[n, c, h, w]``."""
        height, width = pixels.shape[2:]
        need = 4 if self.pattern == "checker" else self.size + self.margin
        if min(height, width) < need:
            raise DataError(f"attack: the trigger needs {need} pixels, images are {height}x{width}")
        mask = np.zeros((height, width), dtype=np.bool_)
        if self.pattern == "checker":
            mask[tuple(np.transpose(CHECKER))] = True
        else:
            bottom, right = height - self.margin, width - self.margin
            mask[bottom - self.size : bottom, right - self.size : right] = True
        mask = mask[::-1] if self.corner.startswith("upper") else mask
        mask = mask[:, ::-1] if self.corner.endswith("left") else mask
        return np.where(mask, np.uint8(round(255 * self.value)), pixels)
