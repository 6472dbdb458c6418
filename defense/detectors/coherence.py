"""Blocks of training rows that cohere with an input, and how much clean inputs cohere with them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

from defense.evidence import Directions
from defense.records import mask_of

Reals = NDArray[np.float32]

CONSISTENT = 1.4826  # makes the median absolute deviation a standard deviation
CHUNK = 2**26  # cosines that are computed together
MEMORY = 2**28  # cosines between rows that are kept
JOINED = 2.0  # standard deviations from which on an input coheres with the seeds of another
TAIL = 0.2  # of the controls, to whose cosines a tail is fitted
SHAPED = 20  # controls in the tail from which on its shape is fitted, too
HEAVIEST = 0.5  # shape at most: beyond it a tail has no variance
RESAMPLES = 200  # of the controls, for the interval of false flags


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


class Rows:
    """Some rows of a training set, whose cosines with each other are computed when needed."""

    def __init__(self, directions: Directions, places: NDArray[np.int64]) -> None:
        """Take the rows at some places."""
        self.places, self.directions = places, directions.take(places)
        self.all: Reals | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.places)

    def between(self, rows: NDArray[np.int64]) -> Reals:
        """Cosines of some rows with all, NaN with themselves: ``[m, n]``.

        Args:
            rows: Their numbers among these rows, ``[m]``.
        """
        if len(self) ** 2 > MEMORY:
            return self._between(rows)
        if self.all is None:
            self.all = self._between(np.arange(len(self)))
        return self.all[rows]

    def _between(self, rows: NDArray[np.int64]) -> Reals:
        values = np.empty((len(rows), len(self)), dtype=np.float32)
        size = max(1, CHUNK // len(self))
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            values[part] = self.directions.rows(rows[part])
        values[np.arange(len(rows)), rows] = np.nan
        return values

    def grow(self, start: Reals, seeds: int, rounds: int) -> Block:
        """Score rows by their cosines with those that cohere most, until these stay the same.

        Args:
            start: Cosine of an input with every row, ``[n]``.
            seeds: Rows with the largest scores that become queries.
            rounds: At most, one or more.
        """
        count, scores, top = min(seeds, len(self)), start, np.zeros(0, dtype=np.int64)
        for _ in range(rounds):
            following = np.sort(np.argpartition(-scores, count - 1)[:count])
            if np.array_equal(top, following):
                break
            top, scores = following, _median(self.between(following))
        return Block(start, scores, top)

    def regrow(self, block: Block, flagged: NDArray[np.bool_]) -> Block:
        """Score rows by their cosines with the flagged ones, bool ``[n]``, instead of the seeds."""
        places = np.flatnonzero(flagged)
        return Block(block.start, _median(self.between(places)), places)


def _median(values: Reals) -> Reals:
    """Median of every column of ``[m, n]`` that leaves NaN out."""
    ordered = np.sort(values, axis=0)  # NaN comes last
    count = len(values) - np.isnan(values).sum(0)
    middle = [np.take_along_axis(ordered, place[None], 0)[0] for place in
              ((count - 1) // 2, count // 2)]  # fmt: skip
    result: Reals = (middle[0] + middle[1]) / 2
    return result


def exceedance(null: Reals, values: Reals) -> NDArray[np.float64]:
    """Chance that another draw from a sample's distribution is as large as some values.

    Beyond the sample's 80 % quantile it is that of a generalised Pareto distribution fitted by
    probability-weighted moments (Hosking & Wallis 1987), of a small sample an exponential one.

    Args:
        null: The sample, ``[k]``.
        values: ``[n]``.

    Returns:
        float64 ``[n]`` in (0, 1].
    """
    sample, wanted = np.sort(null).astype(np.float64), np.asarray(values, dtype=np.float64)
    limit = np.quantile(sample, 1 - TAIL)
    beyond = sample[sample > limit] - limit
    share = (1 + len(beyond)) / (1 + len(sample))
    above = 1 + len(sample) - np.searchsorted(sample, wanted)
    inside = np.maximum(above / (1 + len(sample)), share)
    scale, shape = _pareto(beyond)
    depth = np.maximum(wanted - limit, 0) / scale
    outside = np.exp(-depth) if shape == 0 else (1 + shape * depth) ** (-1 / shape)
    result: NDArray[np.float64] = np.where(wanted > limit, share * outside, inside)
    return np.maximum(result, np.finfo(np.float64).tiny)


def _pareto(excess: NDArray[np.float64]) -> tuple[float, float]:
    """Fit scale and shape of a tail to what lies in it, ascending."""
    mean = float(excess.mean()) if len(excess) else 0.0
    mean = max(mean, float(np.finfo(np.float32).eps))
    if len(excess) < SHAPED:
        return mean, 0.0
    weighted = float((excess * np.arange(len(excess) - 1, -1, -1)).mean() / (len(excess) - 1))
    shape = min(2 - mean / max(mean - 2 * weighted, 1e-3 * mean), HEAVIEST)
    return (mean, 0.0) if shape <= 0 else (mean * (1 - shape), shape)


@dataclass(frozen=True)
class Finding:
    """Which rows of a block cohere more than clean inputs do.

    Attributes:
        flagged: bool ``[n]``.
        scores: Of the block that they settled at, ``[n]``.
        expected_false: See `defense.evidence.Incident`.
        threshold: Score above which rows are flagged.
        strength: See `Controls.strength`.
    """

    flagged: NDArray[np.bool_]
    scores: Reals
    expected_false: tuple[float, float, float]
    threshold: float
    strength: float


class Controls:
    """Clean inputs of a label, whose cohesion with a block's seeds says what chance can do.

    They are to the seeds of a block what clean rows are: neither was chosen for cohering with
    them. So the p-value of a row is the chance that a clean input coheres as much.
    """

    def __init__(self, starts: Reals, rate: float) -> None:
        """Take the cosines of clean inputs with rows ``[k, n]``, and a false-discovery rate."""
        self.starts, self.rate = starts, rate
        self.centre = np.median(starts, axis=0)
        spread = CONSISTENT * np.median(np.abs(starts - self.centre))
        self.spread = max(float(spread), float(np.finfo(np.float32).eps))

    def standardised(self, start: Reals) -> Reals:
        """Express cosines of an input with rows, ``[n]``, in deviations of clean inputs."""
        result: Reals = (start - self.centre) / self.spread
        return result

    def strength(self, block: Block, flagged: NDArray[np.bool_]) -> float:
        """Tell how much a block's input itself coheres with flagged rows, bool ``[n]``."""
        return float(self.standardised(block.start)[flagged].clip(0).sum())

    def are_of_one_incident(self, block: Block, other: Block) -> bool:
        """Tell whether the input of each block coheres with the seeds of the other one."""
        ours, theirs = self.standardised(block.start), self.standardised(other.start)
        return bool(np.median(ours[other.seeds]) >= JOINED <= np.median(theirs[block.seeds]))

    def __len__(self) -> int:
        """Return the number of clean inputs."""
        return len(self.starts)

    def null(self, block: Block, without: int | None = None) -> Reals:
        """Median cosine of clean inputs with the seeds of a block, one of them left out."""
        cosines: Reals = np.median(self.starts[:, block.seeds], axis=1)
        return cosines if without is None else np.delete(cosines, without)

    def discoveries(self, block: Block, without: int | None = None) -> NDArray[np.bool_]:
        """Rows that stand out at the false-discovery rate (Benjamini & Hochberg 1995)."""
        p_values = exceedance(self.null(block, without), block.scores)
        found: NDArray[np.bool_] = false_discovery_control(p_values) <= self.rate
        return found

    def judge(self, rows: Rows, block: Block, rounds: int, without: int | None = None) -> Finding:
        """Flag rows; if they are more than the seeds they become the seeds, until they settle.

        Args:
            rows: The rows.
            block: The block of an input.
            rounds: Times they do, at most.
            without: The clean input it is of, if it is of one.
        """
        flagged = self.discoveries(block, without)
        for _ in range(rounds):
            known = mask_of(block.seeds, len(flagged))
            if flagged.sum() <= len(block.seeds) or np.array_equal(flagged, known):
                break
            block = rows.regrow(block, flagged)
            flagged = self.discoveries(block, without)
        null, scores = self.null(block, without), block.scores
        threshold = float(scores.min() - 1 if flagged.all() else scores[~flagged].max())
        expected = (0.0, 0.0, 0.0)
        if flagged.any() and without is None:
            expected = _false_flags(null, scores[flagged].min(), int((~flagged).sum()))
        return Finding(flagged, scores, expected, threshold, self.strength(block, flagged))


def _false_flags(null: Reals, least: np.float32, clean: int) -> tuple[float, float, float]:
    """Expect false flags among clean rows: their mean, and a 95 % interval over samples."""
    generator = np.random.default_rng(0)
    drawn = [
        exceedance(generator.choice(null, len(null)), np.array([least]))[0]
        for _ in range(RESAMPLES)
    ]
    counts = generator.poisson(clean * np.array(drawn))
    low, high = np.quantile(counts, (0.025, 0.975))
    mean = clean * exceedance(null, np.array([least]))[0]
    return float(mean), min(float(low), float(mean)), max(float(high), float(mean))
