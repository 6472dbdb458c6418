"""Draw subsets that keep the share of every class."""

import numpy as np
import torch
from numpy.typing import NDArray

from defense.errors import DataError


def stratified(
    labels: NDArray[np.int64], size: int | None, generator: torch.Generator, *, role: str
) -> NDArray[np.int64]:
    """Draw rows without replacement, as many of each class as its share asks for.

    Args:
        labels: int64 ``[n]``.
        size: Rows to draw; None takes all.
        generator: The only source of randomness.
        role: Name of the parameter, for the error.

    Returns:
        Row numbers in ascending order, int64 ``[size]``.

    Raises:
        DataError: There are fewer rows than asked for, or fewer asked for than classes.
    """
    if size is None:
        return np.arange(len(labels))
    classes, counts = np.unique(labels, return_counts=True)
    if not len(classes) <= size <= len(labels):
        raise DataError(
            f"data.{role} is {size}, expected between {len(classes)} (one row per class) and "
            f"{len(labels)} (all rows)"
        )
    quotas = _quotas(counts, size)
    order = torch.randperm(len(labels), generator=generator).numpy()
    drawn = [
        order[labels[order] == name][:quota] for name, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def _quotas(counts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Split `size` over classes by largest remainder, at least one each."""
    exact = counts * (size / counts.sum())
    quotas = np.maximum(np.floor(exact).astype(np.int64), 1)
    order = np.argsort(-(exact - quotas), kind="stable")
    for step in range(abs(size - int(quotas.sum()))):
        if size > quotas.sum():
            quotas[order[step % len(order)]] += 1
        else:
            quotas[np.argmax(quotas - exact)] -= 1
    return quotas
