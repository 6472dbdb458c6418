"""Rows whose label the rest of the training set contradicts."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import nn

from defense.compute import progress
from defense.errors import DataError
from defense.evidence import Directions, LabelDoubts
from defense.prediction import logits
from defense.records import ImageSet

REFERENCES = 2048  # rows that all others are compared with, in all classes together
FEWEST = 64  # of them per class, if it has as many
NEAREST = 16  # of a class that speak for or against a row


def doubt_labels(
    model: nn.Module, train: ImageSet, directions: Directions, seed: int
) -> LabelDoubts:
    """Weigh what speaks against the label of every row, and name the label that does.

    Two rankings are averaged. One is by self-influence of the loss (Koh & Liang 2017): how much
    a row's own gradient is all that holds its label. It fails once the model has learnt a wrong
    label by heart, for then there is hardly a loss. The other is by opposition: the margin's
    gradient of a row with a wrong label runs against those of rows that look like it and carry
    another label, and along with few of its own; see `contradiction`.

    Args:
        model: The model that was trained on the rows.
        train: The training set.
        directions: Directions of its rows.
        seed: Of the choice of rows that the others are compared with.

    Raises:
        DataError: Fewer than two classes have two rows.
    """
    against, suggested = contradiction(train, directions, seed)
    chances = torch.softmax(logits(model, train, label="labels").double(), dim=1)
    missing = 1 - chances.gather(1, train.targets()[:, None])[:, 0].numpy()
    holding = missing**2 * directions.self_influence
    doubt = (rankdata(against) + rankdata(holding)) / (2 * len(train))
    return LabelDoubts(doubt.astype(np.float32), suggested)


def contradiction(
    train: ImageSet, directions: Directions, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """How much rows of another class oppose every row, and which class does most.

    Returns:
        The mean of a row's 16 most negative cosines with rows of the class that opposes it most,
        the sign turned, minus the mean of its 16 largest with rows of its own, ``[n]``; and the
        labels of those classes, int64 ``[n]``.
    """
    classes = [label for label in range(train.num_classes) if (train.labels == label).sum() > 1]
    if len(classes) < 2:
        raise DataError(f"expected two or more classes with two rows, got {len(classes)}")
    size = max(FEWEST, REFERENCES // len(classes))
    rng, count = np.random.default_rng(seed), len(train)
    against, own = np.full(count, -np.inf, np.float32), np.zeros(count, np.float32)
    suggested = np.zeros(count, dtype=np.int64)
    for label in progress(iterable=classes, desc="labels", unit="class"):
        same = train.labels == label
        rows = np.sort(rng.permutation(np.flatnonzero(same))[:size])
        cosines = directions.rows(rows)
        own[same] = support(cosines[:, same], np.searchsorted(np.flatnonzero(same), rows))
        opposition = _extreme(-cosines[:, ~same], len(rows))
        suggested[np.flatnonzero(~same)[opposition > against[~same]]] = label
        against[~same] = np.maximum(against[~same], opposition)
    return against - own, suggested


def support(cosines: NDArray[np.float32], own: NDArray[np.int64]) -> NDArray[np.float32]:
    """Mean of the largest cosines of every row ``[m, n]`` with others: ``[n]``.

    Args:
        cosines: Of some rows with all.
        own: Where those rows are among all, ``[m]``; nobody speaks for himself.
    """
    others = cosines.copy()
    others[np.arange(len(own)), own] = -1
    return _extreme(others, len(own) - 1)


def _extreme(values: NDArray[np.float32], known: int) -> NDArray[np.float32]:
    """Mean of the largest values of every column, of which so many are known."""
    count = min(NEAREST, known)
    result: NDArray[np.float32] = np.partition(values, -count, axis=0)[-count:].mean(0)
    return result
