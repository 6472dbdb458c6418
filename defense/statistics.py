"""Statistics of image sets."""

import math

import torch
from torch import Tensor

from defense.compute import batches
from defense.records import ImageSet

ROWS, NUMBERS = 2**12, 2**26  # that are added up together, at most


def channel_statistics(images: ImageSet) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of every channel: two float32 ``[c, 1, 1]``."""
    total = torch.zeros(2, images.shape[0], dtype=torch.float64)
    size = max(1, min(ROWS, NUMBERS // math.prod(images.shape)))
    for rows in batches(len(images), size, label="channel statistics"):
        pixels = images.images(rows).double()
        total += torch.stack([pixels.sum((0, 2, 3)), pixels.square_().sum((0, 2, 3))])
    mean, square = total / (len(images) * images.shape[1] * images.shape[2])
    std = (square - mean.square()).clamp_min(1e-12).sqrt()
    return mean.float()[:, None, None], std.float()[:, None, None]
