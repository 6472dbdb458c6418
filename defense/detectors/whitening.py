"""Directions as clean inputs scatter: what these have in common, or differ by, counts for less.

Clean inputs of a class differ along few directions, such as views of a car, and along these rows
cohere that have nothing else in common. In the metric of the inverse covariance of clean inputs
what is left between two rows is what clean inputs do not have: the direction along which a linear
discriminant tells rows of one cause from clean ones. The covariance is shrunk towards a multiple
of the identity (Ledoit & Wolf 2004, no parameter), because inputs are fewer than dimensions.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from torch import Tensor

from defense.detectors.coherence import Cohering, Reals, Rows
from defense.evidence import Directions
from defense.records import Mask

LEAST = 1e-6  # share of the identity in a covariance, at least, and of the covariance itself
SHORTEST = 0.1  # length in the metric that vectors are taken to have; rounding decides below it
COLUMNS = 2**12  # rows that are compared with clean inputs together
Doubles = NDArray[np.float64]
T = TypeVar("T", np.float64, Doubles)


def ridge(inner: Doubles, size: int) -> float:
    """Choose what is added to the scatter of vectors that makes it Ledoit and Wolf's covariance.

    Args:
        inner: Inner products of vectors less their mean, ``[q, q]``.
        size: Their dimension.
    """
    count, trace = len(inner), float(np.trace(inner))
    square = float((inner**2).sum()) / count**2  # of the covariance
    if square <= np.finfo(np.float32).eps ** 2:
        return 1.0  # they are all the same, and nothing is to be whitened
    noise = float((np.diag(inner) ** 2).sum()) / count**2 - square / count
    apart = square - (trace / count) ** 2 / size  # from the identity
    share = np.clip(noise / max(apart, LEAST * square), LEAST, 1 - LEAST)
    return float(share / (1 - share) * trace / size)


@dataclass(frozen=True)
class Whitened:
    """Directions of rows, in the metric of clean inputs, computed from cosines alone.

    Attributes:
        plain: The directions.
        clean: Those of clean inputs, ``[q, k]``.
        added: What is added to their scatter; see `ridge`.
        factor: Cholesky factor of the sum, ``[q, q]``.
        along: How far each row lies along the factor's axes, ``[q, n]``.
        shared: Inner product of each row with the mean of clean inputs, ``[n]``.
        lengths: Of the rows in the metric, ``[n]``.
    """

    plain: Directions
    clean: Reals
    added: float
    factor: Doubles
    along: Reals
    shared: Reals
    lengths: Reals

    @classmethod
    def by(cls, directions: Directions, clean: Reals) -> "Whitened":
        """See some rows as clean inputs of their class scatter.

        Args:
            directions: Of the rows; of length one.
            clean: Of three or more clean inputs, ``[q, k]``.
        """
        inner = centred((clean @ clean.T).astype(np.float64))
        added = ridge(inner, clean.shape[1])
        factor: Doubles = cholesky(inner + added * np.eye(len(clean)), lower=True)
        cosines = directions.towards(clean)
        own = np.ones(cosines.shape[1], dtype=np.float32)
        along, shared, lengths = _placed(clean, factor, cosines, own)
        return cls(directions, clean, added, factor, along, shared, lengths)

    @property
    def self_influence(self) -> NDArray[np.float32]:
        """See `defense.evidence.Directions`."""
        return self.plain.self_influence

    def take(self, rows: NDArray[np.int64]) -> "Whitened":
        """See `defense.evidence.Directions.take`."""
        return replace(
            self,
            plain=self.plain.take(rows),
            along=np.take(self.along, rows, axis=1),
            shared=self.shared[rows],
            lengths=self.lengths[rows],
        )

    def rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `defense.evidence.Directions.rows`."""
        parts = np.take(self.along, rows, axis=1), self.shared[rows], self.lengths[rows]
        return self._seen(self.plain.rows(rows), *parts)

    def vectors(self, images: Tensor, labels: Tensor) -> NDArray[np.float32]:
        """See `defense.evidence.Directions.vectors`; they are not whitened yet."""
        return self.plain.vectors(images, labels)

    def towards(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `defense.evidence.Directions.towards`."""
        own = (vectors**2).sum(1)
        parts = _placed(self.clean, self.factor, self.clean @ vectors.T, own)
        return self._seen(self.plain.towards(vectors), *parts)

    def left_out(self) -> Reals:
        """Cosine of the clean inputs themselves with every row: ``[q, n]``.

        Each in the metric of all others, as if it were none of those that the metric was made of
        (for the same ridge); within it, it would lie closer to their mean than others do.
        """
        count = len(self.clean)
        inverse = cho_solve((self.factor, True), np.eye(count))
        own = 1 - self.added * np.diag(inverse)[:, None]
        gain = self._gain(own)
        length = np.sqrt(gain * own * count / (count - 1)).clip(SHORTEST)
        result = np.empty((count, len(self.shared)), dtype=np.float32)
        for first in range(0, len(self.shared), COLUMNS):
            part = slice(first, first + COLUMNS)
            rows = solve_triangular(self.factor, self.along[:, part], lower=True, trans=1)
            squares = self.lengths[part] ** 2 + gain * (rows + 1 / count) ** 2 - self._loss
            inner = gain * (rows + own / (count - 1))
            result[:, part] = (inner / (length * np.sqrt(squares))).clip(-1, 1)
        return result

    def without(self, number: int) -> tuple[Reals, float]:
        """Tell how inner products change if one clean input had no part in mean and scatter.

        Returns:
            A number for every row, ``[n]``, whose product for two rows is added to their inner
            product, and what is then subtracted.
        """
        unit = np.zeros(len(self.clean))
        unit[number] = 1
        axis = solve_triangular(self.factor, unit, lower=True)
        gain = self._gain(1 - self.added * (axis @ axis))
        towards: Reals = axis.astype(np.float32) @ self.along
        return np.float32(np.sqrt(gain)) * (towards + np.float32(1 / len(self.clean))), self._loss

    def _gain(self, own: T) -> T:
        """Tell what one of `q` clean inputs takes from inner products (Sherman & Morrison 1950).

        With ``u`` and ``v``, the inner products of two vectors with the input divided by the
        ridge, without it that of the two is larger by ``gain * (u + 1 / q) * (v + 1 / q)`` and
        smaller by `_loss`. All are taken from the mean of all before, of the rest after.

        Args:
            own: Inner product of the input with itself, divided by the ridge; or of several.
        """
        count = len(self.clean)
        return self.added * count / (count - 1 - count * own)

    @property
    def _loss(self) -> float:
        """See `_gain`."""
        return self.added / (len(self.clean) * (len(self.clean) - 1))

    @cached_property
    def _square(self) -> np.float32:
        """Squared length of the mean of clean inputs."""
        return np.float32((self.clean.mean(0) ** 2).sum())

    def _seen(self, cosines: Reals, along: Reals, shared: Reals, lengths: Reals) -> Reals:
        """Turn inner products of some vectors with rows, ``[m, n]``, into cosines in the metric.

        Args:
            cosines: The inner products.
            along: Of the vectors, as are the others; see the class.
            shared: See `along`.
            lengths: See `along`.
        """
        inner = cosines - shared[:, None] - self.shared + self._square - along.T @ self.along
        result: Reals = (inner / (lengths[:, None] * self.lengths)).clip(-1, 1)
        return result


class RowsWithout(Cohering):
    """Rows in the metric of all clean inputs but one.

    An innocent input takes no part in the metric. A clean input that stands for one must not
    either: what rows have in common with it would count for less, and it would find fewer.
    """

    def __init__(self, rows: Rows, metric: Whitened, number: int) -> None:
        """Leave out a clean input.

        Args:
            rows: The rows, in the metric of all.
            metric: That metric, their directions.
            number: Of the clean input.
        """
        self.rows, self.before = rows, metric.lengths
        self.gained, self.lost = metric.without(number)
        squares = self.before**2 + self.gained**2 - self.lost
        self.lengths = np.sqrt(squares.clip(SHORTEST**2))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def between(self, rows: NDArray[np.int64]) -> Reals:
        """See `Cohering.between`."""
        inner = self.rows.between(rows) * (self.before[rows, None] * self.before)
        inner += self.gained[rows, None] * self.gained - self.lost
        inner /= self.lengths[rows, None] * self.lengths
        return inner.clip(-1, 1)

    def separate(self, mask: Mask) -> Mask | None:
        """See `Cohering.separate`; causes are told in the metric of all."""
        return self.rows.separate(mask)


def centred(inner: Doubles) -> Doubles:
    """Turn inner products of vectors, ``[q, q]``, into those of the vectors less their mean."""
    means = inner.mean(0)
    result: Doubles = inner - means - means[:, None] + means.mean()
    return result


def _placed(
    clean: Reals, factor: Doubles, cosines: Reals, squares: Reals
) -> tuple[Reals, Reals, Reals]:
    """Tell where vectors lie: along the factor's axes, along the mean, and their lengths.

    Args:
        clean: See `Whitened`.
        factor: See `Whitened`.
        cosines: Inner products of clean inputs with the vectors, ``[q, n]``.
        squares: Squared lengths of the vectors before, ``[n]``.
    """
    mean = clean.mean(0)
    shared, square = cosines.mean(0), float(mean @ mean)
    cross = cosines - shared - (clean @ mean - square)[:, None]
    along = solve_triangular(factor, cross, lower=True).astype(np.float32)
    left = squares - 2 * shared + square - (along**2).sum(0)
    return along, shared, np.sqrt(left.clip(SHORTEST**2)).astype(np.float32)
