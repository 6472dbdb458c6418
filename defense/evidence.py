"""What a detector may ask about training rows, and what it can say for sure."""

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Directions(Protocol):
    """Directions of training rows, to be compared with each other and with inputs.

    A direction is the gradient of a row's margin in the metric of the damped inverse curvature,
    divided by its norm. Its cosine with another one is influence, normalised on both sides.
    """

    def take(self, rows: NDArray[np.int64]) -> Self:
        """Keep some rows, in the order given, in main memory."""

    def rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Cosine of some rows with every row: ``[m, n]``."""

    def inputs(self, images: Tensor, labels: Tensor) -> NDArray[np.float32]:
        """Cosine of inputs, by the margin of a label each, with every row: ``[q, n]``.

        Args:
            images: float32 ``[q, c, h, w]`` in [0, 1].
            labels: int64 ``[q]``.
        """


@dataclass(frozen=True)
class Incident:
    """Affected inputs that implicate the same rows, judged against controls.

    Attributes:
        affected: Numbers of the affected inputs.
        label: The label they were given.
        p_value: Share of controls that cohere as much with the rows flagged for them, counting
            the incident as one.
        num_controls: Clean inputs that went through the same procedure.
        num_flagged: Rows that are flagged; none if the verdict is that nothing was found.
        false_discovery_rate: Share of false flags that was promised.
        expected_false: Clean rows that chance flags at the same threshold: on average, and the
            2.5 % and 97.5 % quantiles over resampled controls.
    """

    affected: tuple[int, ...]
    label: int
    p_value: float
    num_controls: int
    num_flagged: int
    false_discovery_rate: float
    expected_false: tuple[float, float, float]

    @property
    def precision(self) -> tuple[float, float, float] | None:
        """Estimated precision of the flags: on average, lower and upper end; None without flags."""
        if not self.num_flagged:
            return None
        mean, low, high = (max(0.0, 1 - n / self.num_flagged) for n in self.expected_false)
        return mean, high, low
