"""How much clean inputs cohere with a block of rows, and which rows cohere more."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.stats import betabinom, false_discovery_control

from defense.detectors.coherence import SMALLEST, Block, Cohering, Reals, medians
from defense.records import Mask, mask_of

CONSISTENT = 1.4826  # makes the median absolute deviation a standard deviation
JOINED = 2.0  # standard deviations from which on an input coheres with the seeds of another
TAIL = 0.2  # of the controls, to whose cosines a tail is fitted
SHAPED = 20  # controls in the tail from which on its shape is fitted, too
HEAVIEST = 0.5  # shape at most: beyond it a tail has no variance
LIKELY = 0.5  # chance up to which a row may be clean and still be flagged
RELATED = 1 / 3  # of a block's own coherence, from which on something is of the same cause
ALIKE = 0.5  # of a block's own coherence, from which on a clean input may be of the same cause
RESAMPLES = 200  # of the controls, for the interval of false flags


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
    """Fit scale and shape of a tail to what lies in it, ascending.

    The shape is taken heavier than fitted, by ``(1 + shape) / sqrt(m)`` of `m`, because few
    controls often miss the rare ones that cohere most. That is the standard error of a fit by
    maximum likelihood (Smith 1987); by moments it is 15 % larger at a shape of zero.
    """
    mean = float(excess.mean()) if len(excess) else 0.0
    mean = max(mean, float(np.finfo(np.float32).eps))
    if len(excess) < SHAPED:
        return mean, 0.0
    weighted = float((excess * np.arange(len(excess) - 1, -1, -1)).mean() / (len(excess) - 1))
    fitted = 2 - mean / max(mean - 2 * weighted, 1e-3 * mean)
    shape = min(fitted + (1 + fitted) / len(excess) ** 0.5, HEAVIEST)
    return (mean, 0.0) if shape <= 0 else (mean * (1 - shape), shape)


def local_rates(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Chance that a row is clean, by how dense p-values are where its own lies.

    Those of clean rows are spread evenly over (0, 1]. The density of all, which can only fall,
    is estimated by the slopes of the least concave majorant of their distribution (Grenander
    1956); one over it is the local false-discovery rate (Strimmer 2008, with no rows but clean
    ones as the prior).

    Args:
        p_values: ``[n]`` in (0, 1].
    """
    order = np.argsort(p_values, kind="stable")
    widths = np.diff(p_values[order], prepend=0).clip(np.finfo(np.float64).tiny)
    slopes = 1 / (len(order) * widths)
    density = isotonic_regression(slopes, weights=widths, increasing=False).x
    result = np.empty_like(density)
    result[order] = np.minimum(1 / density, 1)
    return result


@dataclass(frozen=True)
class Finding:
    """Which rows of a block cohere more than clean inputs do.

    Attributes:
        flagged: bool ``[n]``.
        block: The block that they settled at.
        expected_false: See `defense.evidence.Incident`.
        threshold: Largest score of a row that is not flagged.
        strength: See `Controls.strength`.
        null: Median cosine of clean inputs with the seeds of the block, ``[k]``.
        alike: Numbers of the clean inputs that are not among these; see `Controls.alike`.
    """

    flagged: Mask
    block: Block
    expected_false: tuple[float, float, float]
    threshold: float
    strength: float
    null: Reals
    alike: NDArray[np.int64]

    @property
    def p_values(self) -> NDArray[np.float64]:
        """Chance that a clean input coheres as much with the block as each row does, ``[n]``."""
        return exceedance(self.null, self.block.scores)


class Controls:
    """Clean inputs of a label, whose cohesion with a block's seeds says what chance can do.

    They are to the seeds of a block what clean rows are that are no seeds: neither was chosen for
    cohering with them. So the p-value of a row is the chance that a clean input coheres as much.
    Seeds were chosen for it, so that up to 16 clean ones may have small p-values; whether a block
    is more than that is for the verdict to say, whose controls choose seeds in the same way. In a
    metric of controls seeds of a chance block are chosen where these differ little, so that its
    p-values are too small by a factor of two or so; those of a planted block hardly are.
    """

    def __init__(self, starts: Reals, rate: float, contaminated: float = 0.0) -> None:
        """Take what chance can do.

        Args:
            starts: Cosines of clean inputs with rows, ``[k, n]``.
            rate: A false-discovery rate.
            contaminated: Share of the clean inputs that an attack may have reached; see `alike`.
        """
        self.starts, self.rate, self.contaminated = starts, rate, contaminated
        self.centre = medians(starts)
        spread = CONSISTENT * np.median(np.abs(starts - self.centre))
        self.spread = max(float(spread), float(np.finfo(np.float32).eps))

    def where(self, mask: Mask) -> "Controls":
        """Select some of the rows, bool ``[n]``."""
        return Controls(np.compress(mask, self.starts, axis=1), self.rate, self.contaminated)

    def standardised(self, start: Reals) -> Reals:
        """Express cosines of an input with rows, ``[n]``, in deviations of clean inputs."""
        result: Reals = (start - self.centre) / self.spread
        return result

    def strength(self, block: Block) -> float:
        """Tell how much a block's input itself coheres with rows, weighed by their scores.

        Scores rather than flags: many rows may hint at a cause that no single one gives away.
        """
        return float(self.standardised(block.start) @ block.scores.clip(0))

    def are_of_one_incident(self, finding: Finding, other: Finding) -> bool:
        """Tell whether what was found for two inputs has one cause.

        If rows are flagged for both, they are mostly the same. If not, the input of each coheres
        with the seeds of the other one more than clean inputs do, and a third as much as with
        its own, or more: an attack on the same class may cohere a little.
        """
        fewer = min(finding.flagged.sum(), other.flagged.sum())
        if fewer:
            return bool((finding.flagged & other.flagged).sum() > fewer / 2)
        return self._joins(finding, other) and self._joins(other, finding)

    def reach(self, finding: Finding, other: Finding) -> float:
        """Tell how an input coheres with another one's seeds, in deviations of clean inputs."""
        return float(np.median(self.standardised(finding.block.start)[other.block.seeds]))

    def _joins(self, finding: Finding, other: Finding) -> bool:
        theirs = self.reach(finding, other)
        return theirs >= JOINED and theirs >= RELATED * self.reach(finding, finding)

    def __len__(self) -> int:
        """Return the number of clean inputs."""
        return len(self.starts)

    def alike(self, block: Block, without: int | None = None) -> NDArray[np.int64]:
        """Number the clean inputs that cohere with a block as its rows do, if they are few.

        An attack may have reached the clean inputs, too, such as those that were split off from
        the training set: no row coheres more than these, and a single one would hide all. With
        rows that chance picked more than a few clean inputs cohere half as much as they do.

        Args:
            block: The block.
            without: One that does not count.
        """
        enough = ALIKE * np.median(block.scores[block.seeds])
        found = np.setdiff1d(
            np.flatnonzero(self._cosines(block) >= enough), [] if without is None else [without]
        )
        return found if len(found) <= self.contaminated * len(self) else found[:0]

    def null(self, block: Block, without: int | None = None) -> Reals:
        """Median cosine of clean inputs with the seeds of a block, but for those that are alike.

        Args:
            block: The block.
            without: Another one that is left out.
        """
        left = [*self.alike(block, without), *([] if without is None else [without])]
        return np.delete(self._cosines(block), np.array(left, dtype=np.int64))

    def _cosines(self, block: Block) -> Reals:
        return medians(np.take(self.starts, block.seeds, axis=1).T)

    def discoveries(self, block: Block, without: int | None = None) -> Mask:
        """Rows that stand out at the false-discovery rate (Benjamini & Hochberg 1995).

        Of these, only rows that are poison rather than not: a clean row far from the others is
        not flagged because many poisons beyond it keep the rate low. And only rows that cohere
        with the block a third as much as its seeds do, or more: others may have something to
        do with it, such as an attack of its own on the same class, but not the same cause.
        """
        scores, p_values = block.scores, exceedance(self.null(block, without), block.scores)
        found: Mask = false_discovery_control(p_values) <= self.rate
        of_the_block = scores >= RELATED * np.median(scores[block.seeds])
        return found & (local_rates(p_values) <= LIKELY) & of_the_block

    def judge(
        self,
        rows: Cohering,
        block: Block,
        rounds: int,
        without: int | None = None,
        *,
        one_cause: bool = True,
    ) -> Finding:
        """Flag rows; as long as they are more than the seeds they become the seeds.

        Args:
            rows: The rows.
            block: The block of an input.
            rounds: Times they do, at most.
            without: The clean input it is of, if it is of one.
            one_cause: If they then have two causes, flag only rows of that which the input
                coheres with; they are scored by each other once more.
        """
        flagged = self.discoveries(block, without)
        for _ in range(rounds):
            seeds = mask_of(block.seeds, len(flagged))
            if flagged.sum() <= len(block.seeds) or np.array_equal(flagged, seeds):
                break
            block = rows.regrow(block, flagged)
            flagged = self.discoveries(block, without)
        excluded = np.zeros_like(flagged)
        while one_cause and (other := _other_cause(rows, block, flagged)) is not None:
            excluded |= other
            block = rows.regrow(block, flagged & ~excluded)
            flagged = self.discoveries(block, without) & ~excluded
        null, scores = self.null(block, without), block.scores
        threshold = float(scores.min() - 1 if flagged.all() else scores[~flagged].max())
        expected = (0.0, 0.0, 0.0)
        if flagged.any() and without is None:
            expected = _false_flags(null, scores[flagged].min(), int((~flagged).sum()))
        strength = self.strength(block)
        alike = self.alike(block, without)
        return Finding(flagged, block, expected, threshold, strength, null, alike)


def _other_cause(rows: Cohering, block: Block, flagged: Mask) -> Mask | None:
    """Find flagged rows of another cause than the block's input has; None if all have one."""
    places = np.flatnonzero(flagged)
    group = rows.separate(flagged)
    if group is None:
        return None
    parts = places[group], places[~group]  # the larger one may hold several causes
    nearest = [np.sort(block.start[part])[-SMALLEST:].mean() for part in parts]
    return mask_of(parts[int(np.argmin(nearest))], len(flagged))


def _false_flags(null: Reals, least: np.float32, clean: int) -> tuple[float, float, float]:
    """Expect false flags among clean rows: their mean, and the wider ends of two 95 % intervals.

    One is over samples of the controls, whose tail is fitted anew, the other over what the
    number of controls as large as the least of the flags leaves open (Jeffreys' prior): a
    thousand of which none is cannot tell one row in two thousand from none.
    """
    generator = np.random.default_rng(0)
    fitted = [
        exceedance(generator.choice(null, len(null)), np.array([least]))[0]
        for _ in range(RESAMPLES)
    ]
    reached = int((null >= least).sum())
    counted = betabinom(clean, reached + 0.5, len(null) - reached + 0.5)
    ends = (0.025, 0.975)
    resampled = np.quantile(generator.poisson(clean * np.array(fitted)), ends)
    lows, highs = zip(resampled, counted.ppf(ends), strict=True)
    mean = float(clean * exceedance(null, np.array([least]))[0])
    return mean, float(min(*lows, mean)), float(max(*highs, mean))
