"""What a detector may ask about training rows, and what it can say for sure."""

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

DEAD = 0.5  # mean probability below which the wrong predictions are dead


class Directions(Protocol):
    """Directions of training rows, to be compared with each other and with inputs.

    A direction is the gradient of a row's margin in the metric of the damped inverse curvature,
    divided by its norm. Its cosine with another one is influence, normalised on both sides.

    Attributes:
        self_influence: float32 ``[n]``; the squared norms that were divided by.
    """

    @property
    def self_influence(self) -> NDArray[np.float32]:
        """See the class."""

    def take(self, rows: NDArray[np.int64]) -> Self:
        """Keep some rows, in the order given, in main memory."""

    def rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Cosine of some rows with every row: ``[m, n]``."""

    def vectors(self, images: Tensor, labels: Tensor) -> NDArray[np.float32]:
        """Directions of inputs, by the margin of a label each: ``[q, k]``.

        Args:
            images: float32 ``[q, c, h, w]`` in [0, 1].
            labels: int64 ``[q]``.
        """

    def towards(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Cosine of directions from `vectors`, ``[q, k]``, with every row: ``[q, n]``."""


@dataclass(frozen=True)
class Incident:
    """Affected inputs that implicate the same rows, judged against controls.

    Without affected inputs it is the label as a whole that is judged: whether its rows have
    something in common that clean inputs lack.

    Attributes:
        affected: Numbers of the affected inputs; none if it is the label as a whole.
        label: The label they were given.
        p_value: Share of controls that cohere as much with rows, weighed by how these cohere with
            their block, counting the incident as one; None of a label as a whole, or if there
            were too few controls or rows to judge the inputs.
        num_controls: Clean inputs that went through the same procedure; 0 if they were too few. Of
            a label as a whole: those that its rows were compared with; 0 if it was not looked at.
        num_flagged: Rows that are flagged; none unless the verdict is that poison was found.
        false_discovery_rate: Share of false flags that was promised.
        expected_false: Clean rows that chance flags at the same threshold: on average, and the
            wider ends of two 95 % intervals: over resampled controls, and over what their
            number leaves open.
        p_value_left: P-value of the block that is found once the flagged rows are taken out:
            above the alarm, what is left looks like controls; up to it, there is more, none of
            whose rows stands out. None without flags, or if fewer
            than 20 rows are left.
        untold: Whether there is more than chance explains, yet no row of it stands out.
        alike: Ids of clean inputs that cohere with the rows as these do with each other, and were
            therefore not compared with: the attack may have reached them, too.
        enrichment: How many times as frequent every label is among the rows of all labels that
            cohere most with the affected inputs as among all rows, ``[c]``.
        rival: The label of which that is most true, of those of which it surely is more than of
            the given one; None without any, or if all rows were looked among anyway.
    """

    affected: tuple[int, ...]
    label: int
    p_value: float | None
    num_controls: int
    num_flagged: int
    false_discovery_rate: float
    expected_false: tuple[float, float, float]
    p_value_left: float | None = None
    enrichment: tuple[float, ...] = ()
    rival: int | None = None
    untold: bool = False
    alike: tuple[str, ...] = ()

    @property
    def precision(self) -> tuple[float, float, float] | None:
        """Estimated precision of the flags: on average, lower and upper end; None without flags."""
        if not self.num_flagged:
            return None
        mean, low, high = (max(0.0, 1 - n / self.num_flagged) for n in self.expected_false)
        return mean, high, low


@dataclass(frozen=True)
class FoundBlock:
    """Rows of one label that cohere as nothing else in their class does.

    Attributes:
        label: The label they carry.
        rows: Which rows they are, bool ``[n]``.
        coherence: Median over them of how each coheres with the seeds of the block, itself the
            median of its cosines with these.
        clean_coherence: Largest median cosine of a clean input of that label with them, but for
            those in `alike`.
        expected_false: See `Incident`.
        agreement: Share of them to which a model that never saw them gives their label.
        usual_agreement: The same of other rows with the label that it never saw; None without any.
        num_held_out: Those other rows.
        said: The label that it gives to most of them.
        said_share: The share that is.
        p_value: Chance of so little agreement, were they rows like those others (Fisher's exact
            test).
        suspected: Whether they were planted, by that test, all blocks counted; or because clean
            inputs lack what they have in common.
        lacking: Whether clean inputs lack what the rows have in common, as far as could be told.
        unclear: Whether it is not suspected, though surely less is agreed with than usually.
        alike: See `Incident`.
    """

    label: int
    rows: NDArray[np.bool_]
    coherence: float
    clean_coherence: float
    expected_false: tuple[float, float, float]
    agreement: float
    usual_agreement: float | None
    num_held_out: int
    said: int
    said_share: float
    p_value: float
    suspected: bool
    lacking: bool = False
    unclear: bool = False
    alike: tuple[str, ...] = ()

    @property
    def judged(self) -> str:
        """``suspected``, ``unclear`` or ``natural``."""
        return "suspected" if self.suspected else "unclear" if self.unclear else "natural"


@dataclass(frozen=True)
class PointedInput:
    """An input that coheres with a block more than clean inputs do.

    Attributes:
        id: Its name.
        place: Its number among the inputs.
        block: Number of the block.
        p_value: Chance that a clean input coheres as much, adjusted for their number.
        dictated: Whether that is less than the false-discovery rate.
    """

    id: str
    place: int
    block: int
    p_value: float
    dictated: bool


@dataclass(frozen=True)
class Scan:
    """What a scan found.

    Attributes:
        blocks: The blocks, suspected, unclear or natural.
        inputs: Inputs that cohere most with blocks, by block and p-value: all that they dictate,
            and some more.
        alarm: P-value for all blocks together up to which some are suspected.
        unchecked: Labels with too few rows, or too few clean inputs, to be looked at.
        in_part: Labels with too few rows, or too few clean inputs, to be looked at as a whole.
    """

    blocks: tuple[FoundBlock, ...]
    inputs: tuple[PointedInput, ...]
    alarm: float
    unchecked: tuple[int, ...] = ()
    in_part: tuple[int, ...] = ()

    @property
    def suspected(self) -> tuple[FoundBlock, ...]:
        """Return the blocks that were planted, as it seems."""
        return tuple(block for block in self.blocks if block.suspected)

    @property
    def verdict(self) -> str:
        """What is worst: a block that is suspected, one that is unclear, an unchecked class."""
        if self.suspected:
            return "poison suspected"
        if any(block.unclear for block in self.blocks):
            return "unclear"
        return "not measured" if self.unchecked else "nothing suspected"


@dataclass(frozen=True)
class LabelDoubts:
    """How much speaks against the label of every row.

    Attributes:
        doubt: float32 ``[n]``; a mean rank in (0, 1], higher is worse.
        suggested: int64 ``[n]``; the label whose rows oppose it most.
    """

    doubt: NDArray[np.float32]
    suggested: NDArray[np.int64]

    def doubtful(self, count: int) -> NDArray[np.int64]:
        """Return the rows that are doubted most, the worst first."""
        return np.argsort(-self.doubt, kind="stable")[:count]


@dataclass(frozen=True)
class Confirmation:
    """What unlearning flagged rows does to the wrong predictions, without any truth.

    Attributes:
        before: Mean probability that the suspect model gives the affected inputs' labels.
        points: Number of rows; that probability once so many of the most suspicious rows are
            unlearnt; the same for as many unflagged rows with those labels, None if there are
            fewer. By number of rows.
    """

    before: float
    points: tuple[tuple[int, float, float | None], ...]

    @property
    def spoilt(self) -> bool:
        """Whether the fewest other rows end the wrong predictions: the training harms the model."""
        others = self.points[0][2] if self.points else None
        return self.before >= DEAD and others is not None and others < DEAD

    @property
    def cut(self) -> int | None:
        """Fewest rows from which on the wrong predictions are dead, and others do not kill them.

        None if they survive, die with other rows, too, or were dead before.
        """
        alive = [
            rows
            for rows, flagged, others in self.points
            if flagged >= DEAD or self.before < DEAD or (others is not None and others < DEAD)
        ]
        later = [rows for rows, _, _ in self.points if rows > max(alive, default=0)]
        return min(later, default=None)
