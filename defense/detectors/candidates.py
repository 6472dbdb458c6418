"""Which rows and inputs a rule is applied to, and the shape of the answer."""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from defense.contracts import Detector
from defense.errors import DataError, NumericalError
from defense.records import Case, Flags, Mask, Queries


class RowDetector(Detector):
    """A detector that gives every row a suspicion and flags those above a threshold.

    Attributes:
        rows: ``all`` applies the rule to every row, as published; ``predicted_label`` only
            to rows that carry the label an affected input was given, which is where rows
            that taught the model that label must be.
    """

    rows: Literal["all", "predicted_label"] = "all"

    def flags(self, case: Case, suspicion: NDArray[np.floating], threshold: float) -> Flags:
        """Build the answer from a suspicion ``[n]`` and its threshold.

        Raises:
            NumericalError: It is not finite everywhere: such a row would never be flagged.
        """
        require_finite(suspicion, "suspicion")
        carries = predicted_label_rows(case)
        candidates = carries if self.rows == "predicted_label" else np.ones_like(carries)
        return Flags(suspicion.astype(np.float32), float(threshold), candidates, carries)


def predicted_label_rows(case: Case) -> Mask:
    """Mark the rows that carry the predicted label of an affected input: bool ``[n]``."""
    original = case.queries.changed("none")
    return np.isin(case.train.labels, case.queries.labels.numpy()[original])


def require_finite(values: NDArray[np.floating], what: str) -> None:
    """Refuse values that no threshold can be compared with.

    Raises:
        NumericalError: Some are infinite or not a number.
    """
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise NumericalError(
            f"expected finite values of {what}, got {wrong:,} of {values.size:,} that are not; "
            "look at the suspect model's weights and at the factors, and make both anew"
        )


def narrowed(case: Case, count: int | None) -> Case:
    """Restrict a case to its first affected inputs; None keeps all.

    Raises:
        DataError: There are fewer.
    """
    if count is None:
        return case
    affected = case.queries.affected.numpy()
    numbers = np.unique(affected)
    if len(numbers) < count:
        raise DataError(
            f"detector.affected is {count}, but only {len(numbers)} affected inputs were scored; "
            "raise affected.count"
        )
    kept = np.isin(affected, numbers[:count])
    queries = Queries(*(part[torch.from_numpy(kept)] for part in vars(case.queries).values()))
    return replace(case, queries=queries, scores=case.scores[kept])
