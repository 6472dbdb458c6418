"""Parts of the train set that unlearners draw."""

import numpy as np
import torch
from numpy.typing import NDArray

from defense.records import ImageSet


def part(images: ImageSet, share: float, generator: torch.Generator) -> NDArray[np.int64]:
    """Draw a share of a set, at least one row; returns row numbers in drawn order."""
    count = max(1, round(share * len(images)))
    return torch.randperm(len(images), generator=generator)[:count].numpy()


def join(first: ImageSet, second: ImageSet) -> ImageSet:
    """Put two selections of one set behind each other."""
    return ImageSet(
        first.pixels,
        np.concatenate([first.labels, second.labels]),
        np.concatenate([first.ids, second.ids]),
        first.class_names,
        np.concatenate([first.rows, second.rows]),
    )


def shuffled(images: ImageSet, generator: torch.Generator) -> ImageSet:
    """Put a set in random order, for batches that are alike."""
    return images.take(part(images, 1.0, generator))
