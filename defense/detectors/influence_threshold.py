"""Plain influence above a threshold, the baseline of Delta-Influence (method card 3.5)."""

from typing import Literal

import numpy as np

from defense.detectors.scored import ScoreDetector
from defense.records import Case, Flags


class InfluenceThreshold(ScoreDetector):
    """Flag rows whose influence on the affected inputs is above a threshold.

    Attributes:
        threshold: In units of the margin; the paper's grid is 0, 10, 100, 500.
    """

    name: Literal["influence_threshold"] = "influence_threshold"
    threshold: float = 0.0

    def detect(self, case: Case) -> Flags:
        """See `Detector.detect`; several affected inputs are averaged."""
        original = (case.queries.transform == -1).numpy()
        mean: np.ndarray = case.scores[original].mean(0)
        return self.flags(case, mean, self.threshold)
