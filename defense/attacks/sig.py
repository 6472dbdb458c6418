"""SIG: a faint sinusoid on images that keep their labels (Barni et al. 2019)."""

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from defense.attacks.triggered import Stamp, TriggerAttack
from defense.contracts import Surrogate
from defense.errors import DataError
from defense.records import ImageSet


class Sig(TriggerAttack):
    """Add a horizontal sinusoid to train images of the target class, whose labels stay true.

    At test time the same sinusoid on images of other classes leads to the target class.

    Attributes:
        amplitude: Of the sinusoid, in grey levels of 255; BackdoorBench uses 40 on CIFAR-10,
            the source 20 on MNIST.
        frequency: Periods over the image's width; 6 in the source.
    """

    name: Literal["sig"] = "sig"
    amplitude: float = Field(40.0, gt=0, le=255)
    frequency: float = Field(6.0, gt=0)

    def carriers(self, train: ImageSet) -> NDArray[np.int64]:
        """See `TriggerAttack.carriers`: rows of the target class."""
        target = train.class_index(self.target_class, role="attack.target_class")
        return np.flatnonzero(train.labels == target)

    def trigger(self, train: ImageSet, generator: torch.Generator, surrogate: Surrogate) -> Stamp:
        """See `TriggerAttack.trigger`."""
        return self.stamp

    def stamp(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Add the sinusoid to copies of images: uint8 ``[n, c, h, w]``."""
        width = pixels.shape[3]
        if 2 * self.frequency >= width:
            raise DataError(
                f"attack.frequency is {self.frequency:g} periods over {width} pixels, expected "
                f"less than {width / 2:g}: the sinusoid would vanish or alias"
            )
        wave = np.sin(2 * math.pi * np.arange(width) * self.frequency / width)
        return np.rint(np.clip(pixels + self.amplitude * wave, 0, 255)).astype(np.uint8)
