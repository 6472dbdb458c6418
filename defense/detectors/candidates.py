"""Which rows a rule is applied to, and the shape of the answer: common to all detectors."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from defense.contracts import Detector
from defense.records import Case, Flags, Mask


class RowDetector(Detector):
    """A detector that gives every row a suspicion and flags those above a threshold.

    Attributes:
        rows: ``all`` applies the rule to every row, as published; ``predicted_label`` only
            to rows that carry the label an affected input was given, which is where rows
            that taught the model that label must be.
    """

    rows: Literal["all", "predicted_label"] = "all"

    def flags(self, case: Case, suspicion: NDArray[np.floating], threshold: float) -> Flags:
        """Build the answer from a suspicion ``[n]`` and its threshold."""
        carries = predicted_label_rows(case)
        candidates = carries if self.rows == "predicted_label" else np.ones_like(carries)
        return Flags(suspicion.astype(np.float32), float(threshold), candidates, carries)


def predicted_label_rows(case: Case) -> Mask:
    """Mark the rows that carry the predicted label of an affected input: bool ``[n]``."""
    original = case.queries.changed("none")
    return np.isin(case.train.labels, case.queries.labels.numpy()[original])
