"""Plain influence above a threshold, the baseline of Delta-Influence (method card 3.5)."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.stats import rankdata

from defense.detectors.affected import ScoreDetector
from defense.records import Case, Mask


class InfluenceThreshold(ScoreDetector):
    """Flag rows whose influence on the affected inputs is above a threshold.

    Attributes:
        threshold: In units of the margin; the paper's grid is 0, 10, 100, 500. Another model,
            data set or damping has other units.
        share: Instead of a threshold, the share of all rows that is flagged, by one affected
            input or by the mean of several; rows are judged by their rank then. The authors'
            released run flags 0.27.
        several: What is made of several affected inputs: ``mean`` averages their influence,
            ``boosted`` wants each above the threshold, or in its `share`, but
            `affected_tolerance` (section 6.1).
    """

    name: Literal["influence_threshold"] = "influence_threshold"
    threshold: float = 0.0
    share: float | None = Field(None, gt=0, lt=1)
    several: Literal["mean", "boosted"] = "mean"

    @model_validator(mode="after")
    def _require_several(self) -> "InfluenceThreshold":
        if self.affected_tolerance and self.several == "mean":
            raise ValueError("affected_tolerance has no meaning for a mean: set several to boosted")
        return self

    @property
    def limit(self) -> float:
        """See `ScoreDetector.limit`."""
        return self.threshold if self.share is None else 1 - self.share

    def suspicion(self, case: Case, chosen: Mask) -> NDArray[np.float32]:
        """See `ScoreDetector.suspicion`: influence, or its rank where ranks must agree."""
        values: NDArray[np.float32] = case.scores[chosen & case.queries.changed("none")][0]
        return self._ranked(values) if self.several == "boosted" else values

    def agree(self, parts: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `ScoreDetector.agree`."""
        return super().agree(parts) if self.several == "boosted" else self._ranked(parts.mean(0))

    def _ranked(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Replace influence by the share of rows up to it, if a share is flagged."""
        return values if self.share is None else (rankdata(values) / len(values)).astype(np.float32)
