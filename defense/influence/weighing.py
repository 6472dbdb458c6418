"""Which rows factors are fitted on; the fast tier needs those whose labels surprise the model."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from defense.compute import seeded
from defense.records import ImageSet

ODDS = 0.5  # log-odds by which draws are nudged; see `nudged`


def drawn(
    images: ImageSet, most: int | None, generator: torch.Generator
) -> tuple[ImageSet, Tensor]:
    """Draw the rows that factors are fitted on, and for each a number that decides its label.

    Args:
        images: The training set.
        most: Rows at most; None takes all.
        generator: The only source of randomness.

    Returns:
        The rows, and as many numbers in [0, 1).
    """
    if most is not None:
        chosen = torch.randperm(len(images), generator=generator)[:most]
        images = images.take(chosen.sort().values.numpy())
    return images, torch.rand(len(images), generator=generator)


def nudged(draws: Tensor) -> list[Tensor]:
    """Return numbers in [0, 1) as they are, and with their odds moved down and up.

    A label that is drawn with a number by a rounded model, and another by the model itself,
    is drawn with a nudged number by both. Of the two networks of the benchmark bfloat16 moved
    no cumulated probability by more than 0.35 in log-odds (4,096 rows each).
    """
    odds = draws.double().logit()
    return [draws, (odds - ODDS).sigmoid(), (odds + ODDS).sigmoid()]


def squared(slopes: Tensor) -> Tensor:
    """Sum the squares of the loss gradients of rows: ``[n, k]`` to float64 ``[n]``."""
    return slopes.double().square().sum(1).cpu()


def heaviest(weights: Tensor, rest: float) -> NDArray[np.int64]:
    """Return the fewest rows, ascending, without which the weights sum up to `rest` at most."""
    order = weights.argsort(descending=True, stable=True)
    tails = weights[order].flip(0).cumsum(0).flip(0)
    count = max(1, int((tails > rest).sum()))
    return order[:count].sort().values.numpy()


def drawn_by_weight(weights: Tensor, count: int) -> NDArray[np.int64]:
    """Draw rows with odds of their weights, always the same ones; none if all weigh nothing."""
    if not float(weights.sum()):
        return np.empty(0, dtype=np.int64)
    places = torch.multinomial(
        weights, count, replacement=True, generator=seeded(0, "rows left out")
    )
    return places.numpy()
