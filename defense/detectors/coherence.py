"""Blocks of training rows that cohere with an input and with each other."""

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

from defense.evidence import Directions
from defense.records import Mask

Reals = NDArray[np.float32]

CHUNK = 2**26  # cosines that are computed together
MEMORY = 2**28  # cosines between rows that are kept
APART = 0.4  # cosine between what two groups of rows share, below which they have two causes
CAUSES = 6  # groups that are tried, at most
SMALLEST = 16  # rows of a group
COMPONENTS = 16  # of how rows cohere with all, by which they are grouped


@dataclass(frozen=True)
class Block:
    """Rows that cohere with an input and with each other.

    Attributes:
        start: Cosine of the input with every row, ``[n]``.
        scores: Median cosine of every row with the seeds but itself, ``[n]``.
        seeds: Numbers of the rows that became queries last, ``[s]``.
    """

    start: Reals
    scores: Reals
    seeds: NDArray[np.int64]


class Cohering(ABC):
    """Rows that are known by their cosines with each other alone."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def between(self, rows: NDArray[np.int64]) -> Reals:
        """Cosines of some rows with all, NaN with themselves: ``[m, n]``.

        Args:
            rows: Their numbers among these rows, ``[m]``.
        """

    @abstractmethod
    def separate(self, mask: Mask) -> Mask | None:
        """Tell some of the rows, bool ``[n]``, by their causes: see :func:`separate`."""

    def mean(self) -> Reals:
        """Mean cosine of every row with all but itself, ``[n]``."""
        size = max(1, CHUNK // len(self))
        parts = np.split(np.arange(len(self)), range(size, len(self), size))
        means: Reals = np.concatenate([np.nanmean(self.between(part), axis=1) for part in parts])
        return means

    def grow(self, start: Reals, seeds: int, rounds: int) -> Block:
        """Score rows by their cosines with those that cohere most, until these stay the same.

        Args:
            start: Cosine of an input with every row, ``[n]``.
            seeds: Rows with the largest scores that become queries.
            rounds: At most, one or more.
        """
        count, scores, top = min(seeds, len(self)), start, np.zeros(0, dtype=np.int64)
        for _ in range(rounds):
            following = np.sort(leading(scores, count))
            if np.array_equal(top, following):
                break
            top, scores = following, medians(self.between(following))
        return Block(start, scores, top)

    def regrow(self, block: Block, flagged: Mask) -> Block:
        """Score rows by their cosines with the flagged ones, bool ``[n]``, instead of the seeds."""
        places = np.flatnonzero(flagged)
        return Block(block.start, medians(self.between(places)), places)


class Rows(Cohering):
    """Some rows of a training set, whose cosines with each other are computed when needed."""

    def __init__(self, directions: Directions, places: NDArray[np.int64]) -> None:
        """Take the rows at some places."""
        self.places, self.directions = places, directions.take(places)
        self.all: Reals | None = None
        self.parts: dict[bytes, Mask | None] = {}

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.places)

    def where(self, mask: Mask) -> "Rows":
        """Select some of the rows, bool ``[n]``; what is known of them stays known."""
        kept = np.flatnonzero(mask)
        part, known = copy(self), self.all
        part.places, part.directions = self.places[kept], self.directions.take(kept)
        part.all = None if known is None else known[np.ix_(kept, kept)]
        return part

    def seen(self, directions: Directions) -> "Rows":
        """See the same rows along other directions of theirs."""
        other = copy(self)
        other.directions, other.all, other.parts = directions, None, {}
        return other

    def between(self, rows: NDArray[np.int64]) -> Reals:
        """See `Cohering.between`."""
        if len(self) ** 2 > MEMORY:
            return self._between(rows)
        if self.all is None:
            self.all = self._between(np.arange(len(self)))
        return self.all[rows]

    def separate(self, mask: Mask) -> Mask | None:
        """See `Cohering.separate`.

        Answers are kept, because the controls of a large block come to the same rows.
        """
        key = self.places[mask].tobytes()
        if key not in self.parts:
            part = self.where(mask)
            self.parts[key] = separate(part.between(np.arange(len(part))))
        return self.parts[key]

    def _between(self, rows: NDArray[np.int64]) -> Reals:
        values = np.empty((len(rows), len(self)), dtype=np.float32)
        size = max(1, CHUNK // len(self))
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            values[part] = self.directions.rows(rows[part])
        values[np.arange(len(rows)), rows] = np.nan
        return values


def leading(scores: Reals, count: int) -> NDArray[np.int64]:
    """Name the rows with the largest scores, in any order."""
    return np.argpartition(-scores, count - 1)[:count]


def medians(values: Reals) -> Reals:
    """Median of every column of ``[m, n]`` that leaves NaN out."""
    ordered = np.sort(values, axis=0)  # NaN comes last
    count = len(values) - np.isnan(values).sum(0)
    middle = [np.take_along_axis(ordered, place[None], 0)[0] for place in
              ((count - 1) // 2, count // 2)]  # fmt: skip
    result: Reals = (middle[0] + middle[1]) / 2
    return result


def separate(cosines: Reals) -> Mask | None:
    """Tell rows of one cause from others, if there is more than one.

    Rows of one cause share a direction, be it a large or a small part of them: cosines between
    two groups of them are the geometric mean of those within. The groups are those of k-means
    on how each row coheres with all, whatever the size of that: two, then more, because with
    more causes than groups a group holds several, whose cosines say nothing.

    Args:
        cosines: Between the rows, NaN with themselves, ``[m, m]``.

    Returns:
        A group that is of another cause than every other group, bool ``[m]``; None if all seem
        to have the same.
    """
    groups = range(2, min(CAUSES, len(cosines) // SMALLEST) + 1)
    profiles = _profiles(cosines) if groups else cosines
    for count in groups:
        with threadpool_limits(1, "openmp"):  # several threads wait ten times as long as they work
            labels = KMeans(count, n_init=4, random_state=0).fit(profiles).labels_
        if np.bincount(labels).min() < SMALLEST:
            continue
        alone = np.flatnonzero((_shared(cosines, labels) < APART).all(1))
        if len(alone):
            result: Mask = labels == alone[0]
            return result
    return None


def _profiles(cosines: Reals) -> Reals:
    """Describe how each row coheres with all, whatever the size of that: ``[m, p]``.

    Groups differ along the leading components; k-means on all of them takes ten times as long.
    """
    profiles = np.nan_to_num(cosines)
    profiles /= np.maximum(np.linalg.norm(profiles, axis=1, keepdims=True), 1e-12)
    profiles -= profiles.mean(0)
    left, sizes, _ = randomized_svd(profiles, min(COMPONENTS, len(profiles)), random_state=0)
    leading: Reals = left * sizes
    return leading


def _shared(cosines: Reals, labels: NDArray[np.int32]) -> NDArray[np.float64]:
    """Share of a direction that each group has in common with each other, ``[k, k - 1]``.

    One where nothing is in common within a group.
    """
    groups = [np.flatnonzero(labels == number) for number in range(labels.max() + 1)]
    medians = np.array(
        [[np.nanmedian(cosines[np.ix_(one, other)]) for other in groups] for one in groups]
    )
    own = np.sqrt(np.diag(medians).clip(0))
    within = np.outer(own, own)
    shares = np.divide(medians, within, out=np.ones_like(medians), where=within > 0)
    return shares[~np.eye(len(groups), dtype=np.bool_)].reshape(len(groups), -1)
