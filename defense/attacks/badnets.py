"""BadNets: a small patch in a corner (Gu et al. 2017; method card 2.1)."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from defense.attacks.triggered import TriggerAttack
from defense.errors import DataError

CHECKER = ((-4, -2), (-2, -2), (-3, -3), (-2, -4))


class BadNets(TriggerAttack):
    """Set a patch near the lower right corner to one value in all channels.

    Attributes:
        pattern: ``checker``: the four pixels the Delta-Influence authors set; ``square``:
            all pixels of a square.
        size: Side of the square in pixels; only for ``square``.
        margin: Pixels between the square and the border; only for ``square``.
        value: Brightness of the patch in [0, 1]; 0 is black.
    """

    name: Literal["badnets"] = "badnets"
    pattern: Literal["checker", "square"] = "checker"
    size: int = Field(3, gt=0)
    margin: int = Field(1, ge=0)
    value: float = Field(0.0, ge=0, le=1)

    def stamp(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See `TriggerAttack.stamp`."""
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
        return np.where(mask, np.uint8(round(255 * self.value)), pixels)
