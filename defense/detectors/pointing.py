"""Which labels the rows carry that cohere most with an input."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom


@dataclass(frozen=True)
class Pointed:
    """How many rows carry each label, of those that cohere most with an input, and of a sample.

    Attributes:
        leading: ``[c]``.
        sample: ``[c]``.
    """

    leading: NDArray[np.int64]
    sample: NDArray[np.int64]

    @property
    def enrichment(self) -> NDArray[np.float64]:
        """How many times as frequent every label is among the leading rows as in the sample."""
        expected = self.sample * (self.leading.sum() / self.sample.sum())
        return np.divide(self.leading, expected, out=np.zeros(len(expected)), where=expected > 0)

    def rival(self, label: int, alarm: float) -> int | None:
        """Name the label that is enriched most, of those that surely are more than a given one.

        Args:
            label: The given label.
            alarm: Chance up to which they surely are, all labels counted: that so many of the
                leading rows carry a label, were it as frequent among them as in the sample, or
                as enriched as the given one is. Rows that are alike lead together, and raise it.
        """
        enrichment, share = self.enrichment, self.sample / self.sample.sum()
        expected = np.minimum(share * max(1.0, enrichment[label]), 1)
        chances = binom.sf(self.leading - 1, self.leading.sum(), expected) * len(share)
        chances[label] = 1
        rivals = np.flatnonzero((chances <= alarm) & (enrichment > enrichment[label]))
        return int(rivals[enrichment[rivals].argmax()]) if len(rivals) else None
