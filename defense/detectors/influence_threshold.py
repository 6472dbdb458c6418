"""Plain influence above a threshold, the baseline of Delta-Influence (method card 3.5)."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.stats import rankdata

from defense.detectors.affected import ScoreDetector
from defense.records import Case, Mask


class InfluenceThreshold(ScoreDetector):
    """Flag rows whose influence on the affected inputs is above a threshold.

    Attributes:
        threshold: In units of the margin; the paper's grid is 0, 10, 100, 500. Another model,
            data set or damping has other units.
        share: Instead of a threshold, the share of all rows that one affected input flags;
            rows are judged by their rank then. The authors' released run flags 0.27.
        several: What is made of several affected inputs: ``mean`` averages their influence,
            ``boosted`` wants each above the threshold but `affected_tolerance` (section 6.1).
    """

    name: Literal["influence_threshold"] = "influence_threshold"
    threshold: float = 0.0
    share: float | None = Field(None, gt=0, lt=1)
    several: Literal["mean", "boosted"] = "mean"

    @property
    def limit(self) -> float:
        """See `ScoreDetector.limit`."""
        return self.threshold if self.share is None else 1 - self.share

    def suspicion(self, case: Case, chosen: Mask) -> NDArray[np.float32]:
        """See `ScoreDetector.suspicion`: the row's influence, or the share of rows up to it."""
        values: NDArray[np.float32] = case.scores[chosen & case.queries.changed("none")][0]
        return values if self.share is None else (rankdata(values) / len(values)).astype(np.float32)

    def agree(self, parts: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `ScoreDetector.agree`."""
        if self.several == "boosted":
            return super().agree(parts)
        mean: NDArray[np.float32] = parts.mean(0)
        return mean
