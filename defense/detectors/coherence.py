"""Blocks of training rows that cohere with an input, and how much clean inputs make cohere."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

from defense.evidence import Directions

Reals = NDArray[np.float32]

CONSISTENT = 1.4826  # makes the median absolute deviation a standard deviation
CHUNK = 2**26  # cosines that are standardised together
MEMORY = 2**28  # cosines between rows that are kept
JOINED = 2.0  # standard deviations from which on an input coheres with the seeds of another
LIKE = 0.5  # of the score of a block's seeds, from which on other seeds belong to it


def standardised(cosines: Reals) -> Reals:
    """Express every row of ``[q, n]`` in robust standard deviations around its median.

    Where more than half are equal the deviation is no less than a cosine's rounding error.
    """
    centre = np.median(cosines, axis=1, keepdims=True)
    spread = CONSISTENT * np.median(np.abs(cosines - centre), axis=1, keepdims=True)
    result: Reals = (cosines - centre) / np.maximum(spread, np.finfo(np.float32).eps)
    return result


@dataclass(frozen=True)
class Block:
    """Rows that cohere with an input and with each other.

    Attributes:
        start: Standardised cosine of the input with every row, ``[n]``.
        scores: Median standardised cosine of every row with the seeds but itself, standardised
            again, ``[n]``.
        places: Numbers of the training rows, ascending, ``[n]``.
        seeds: Those of the rows with the largest scores, ``[s]``.
    """

    start: Reals
    scores: Reals
    places: NDArray[np.int64]
    seeds: NDArray[np.int64]

    def is_like(self, *others: "Block") -> bool:
        """Tell whether the seeds of this block belong to one of others, and its to this one."""
        return any(self._holds(other) and other._holds(self) for other in others)

    def _holds(self, other: "Block") -> bool:
        theirs = self.scores[np.isin(self.places, other.seeds)]
        own = self.scores[np.isin(self.places, self.seeds)]
        return len(theirs) > 0 and bool(np.median(theirs) >= LIKE * np.median(own))

    def is_of_one_incident_with(self, other: "Block") -> bool:
        """Tell whether the input of each block coheres with the seeds of the other one."""
        theirs = self.start[np.isin(self.places, other.seeds)]
        ours = other.start[np.isin(other.places, self.seeds)]
        return bool(np.median(theirs) >= JOINED and np.median(ours) >= JOINED)

    def strength(self, flagged: NDArray[np.bool_]) -> float:
        """Tell how much the input itself coheres with the flagged rows, bool ``[n]``."""
        return float(self.start[flagged].sum())


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
        """Standardised cosines of some rows with all, NaN with themselves: ``[m, n]``.

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
            values[part] = standardised(self.directions.rows(rows[part]))
        values[np.arange(len(rows)), rows] = np.nan
        return values

    def grow(self, start: Reals, seeds: int, rounds: int) -> Block:
        """Score rows by their cosines with those that cohere most, until these stay the same.

        Medians are standardised again, because those of rows that are much alike scatter more.

        Args:
            start: Standardised cosine of an input with every row, ``[n]``.
            seeds: Rows with the largest scores that become queries.
            rounds: At most.
        """
        scores, known = start, frozenset[int]()
        for _ in range(rounds):
            top = np.sort(np.argpartition(-scores, min(seeds, len(self)) - 1)[:seeds])
            if known == (known := frozenset(top.tolist())):
                break
            scores = standardised(_median(self.between(top))[None])[0]
        last = np.argsort(-scores, kind="stable")[:seeds]
        return Block(start, scores, self.places, self.places[last])


def _median(values: Reals) -> Reals:
    """Median of every column of ``[m, n]`` that leaves NaN out."""
    ordered = np.sort(values, axis=0)  # NaN comes last
    count = len(values) - np.isnan(values).sum(0)
    middle = [np.take_along_axis(ordered, place[None], 0)[0] for place in
              ((count - 1) // 2, count // 2)]  # fmt: skip
    result: Reals = (middle[0] + middle[1]) / 2
    return result


@dataclass(frozen=True)
class Finding:
    """How a block of rows compares with those of controls.

    Attributes:
        p_value: See `defense.evidence.Incident`.
        flagged: bool ``[n]``.
        expected_false: See `defense.evidence.Incident`.
        threshold: Score above which rows are flagged.
    """

    p_value: float
    flagged: NDArray[np.bool_]
    expected_false: tuple[float, float, float]
    threshold: float


class Controls:
    """What the procedure finds for clean inputs: an empirical null distribution.

    A row's p-value is the share of all scores of controls that are as large. A strong block draws
    in some controls: those that end at the block that is judged, the control itself among them,
    or at that of another incident, are left out. The p-value of a verdict is the share of
    controls that cohere as much with the rows that are flagged for them; those that were drawn
    in do not.
    """

    def __init__(self, blocks: list[Block], rate: float) -> None:
        """Take the block of every control, and a false-discovery rate."""
        self.blocks, self.rate = blocks, rate
        self.ordered = [np.sort(block.scores) for block in blocks]
        self.pool = np.sort(np.concatenate(self.ordered))
        self.strengths = np.array([block.strength(self.discoveries(block)) for block in blocks])

    def p_values(self, block: Block, *known: Block) -> NDArray[np.float64]:
        """P-value of every row of a block, with other blocks that are known: ``[n]``."""
        above, total = _at_least(self.pool, block.scores), len(self.pool)
        for other, ordered in zip(self.blocks, self.ordered, strict=True):
            if other.is_like(block, *known):
                above, total = above - _at_least(ordered, block.scores), total - len(ordered)
        values: NDArray[np.float64] = (1 + above) / (1 + total)
        return values

    def discoveries(self, block: Block, *known: Block) -> NDArray[np.bool_]:
        """Rows that stand out at the false-discovery rate (Benjamini & Hochberg 1995)."""
        values = false_discovery_control(self.p_values(block, *known))
        found: NDArray[np.bool_] = values <= self.rate
        return found

    def judge(self, block: Block, *known: Block) -> Finding:
        """Judge the block of an incident, where those of other incidents are known."""
        flagged, scores = self.discoveries(block, *known), block.scores
        stronger = (self.strengths >= block.strength(flagged)).sum()
        threshold = float(scores.min() - 1 if flagged.all() else scores[~flagged].max())
        lowest = scores[flagged].min() if flagged.any() else np.inf
        others = [other.scores for other in self.blocks if not other.is_like(block, *known)]
        counts = [int((each >= lowest).sum()) for each in others] or [0]
        low, high = np.quantile(counts, (0.025, 0.975))
        expected = float(np.mean(counts)), float(low), float(high)
        return Finding((1 + int(stronger)) / (1 + len(self.blocks)), flagged, expected, threshold)


def _at_least(ordered: Reals, values: Reals) -> NDArray[np.int64]:
    """Count the entries of an ascending array that are as large as each value."""
    counts: NDArray[np.int64] = len(ordered) - np.searchsorted(ordered, values)
    return counts
