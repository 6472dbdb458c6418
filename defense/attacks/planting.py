"""How poison gets into a train set: drawing rows, copying pixels, noting what was planted."""

import numpy as np
import torch
from numpy.typing import NDArray

from defense.compute import batches, pixel_store
from defense.errors import DataError
from defense.records import ImageSet, Mask, Truth, mask_of


def choose(
    rows: NDArray[np.int64], fraction: float, num_train: int, generator: torch.Generator
) -> NDArray[np.int64]:
    """Draw the rows to poison.

    Args:
        rows: Rows that may be poisoned.
        fraction: Rows to poison as a share of the train set.
        num_train: Size of the train set.
        generator: The only source of randomness.

    Raises:
        DataError: The share is less than one row or more than there are.
    """
    count = round(fraction * num_train)
    if not 0 < count <= len(rows):
        raise DataError(
            f"attack.poison_fraction asks for {count} poisoned rows, expected between 1 and "
            f"{len(rows)} (train rows of the class that carries the poison)"
        )
    return rows[torch.randperm(len(rows), generator=generator)[:count].numpy()]


def copy_pixels(train: ImageSet) -> NDArray[np.uint8]:
    """Copy all images to a store of their own: uint8 ``[n, c, h, w]``."""
    pixels = pixel_store((len(train), *train.shape))
    for rows in batches(len(train), 4096, label="copy"):
        pixels[rows] = train.uint8(rows)
    return pixels


def truth_of(
    train: ImageSet,
    chosen: NDArray[np.int64],
    target: int,
    probe_labels: NDArray[np.int64],
    *,
    victims: Mask,
) -> Truth:
    """Note what was planted; the arguments are as in `Truth`, `chosen` are row numbers."""
    return Truth(mask_of(chosen, len(train)), train.labels, target, probe_labels, victims)
