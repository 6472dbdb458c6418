"""Plain influence above a threshold, the baseline of Delta-Influence (method card 3.5)."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from defense.detectors.affected import ScoreDetector
from defense.records import Case, Mask


class InfluenceThreshold(ScoreDetector):
    """Flag rows whose influence on the affected inputs is above a threshold.

    Attributes:
        threshold: In units of the margin; the paper's grid is 0, 10, 100, 500.
        several: What is made of several affected inputs: ``mean`` averages their influence,
            ``boosted`` wants each above the threshold but `affected_tolerance` (section 6.1).
    """

    name: Literal["influence_threshold"] = "influence_threshold"
    threshold: float = 0.0
    several: Literal["mean", "boosted"] = "mean"

    @property
    def limit(self) -> float:
        """See `ScoreDetector.limit`."""
        return self.threshold

    def suspicion(self, case: Case, chosen: Mask) -> NDArray[np.float32]:
        """See `ScoreDetector.suspicion`: the row's influence."""
        return case.scores[chosen & case.queries.changed("none")][0]

    def agree(self, parts: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `ScoreDetector.agree`."""
        if self.several == "boosted":
            return super().agree(parts)
        mean: NDArray[np.float32] = parts.mean(0)
        return mean
