"""Delta-Influence: rows whose influence collapses under transforms (method card 3.6)."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from defense.detectors.scored import ScoreDetector
from defense.errors import DataError
from defense.records import Case, Flags


class DeltaInfluence(ScoreDetector):
    """Count rule of Delta-Influence (Li et al. 2024, section 4).

    Delta of a row and a transform is the row's influence on the transformed input with its
    new label minus its influence on the affected input with its predicted label. A row is
    flagged when Delta is below `tau` for all but `tolerance` of the transforms.

    Attributes:
        tau: Threshold on Delta; the paper's grid is 0, -1, -5, -10, -100, the authors'
            CIFAR-100 notebook uses -40.
        tolerance: Transforms that may disagree (``n_tol``); the paper's grid is 0 to 3.
        affected_tolerance: Of several affected inputs, those that may disagree; 0 is the
            paper's intersection (section 6.1).
    """

    name: Literal["delta_influence"] = "delta_influence"
    tau: float = Field(0.0, le=0)
    tolerance: int = Field(1, ge=0)
    affected_tolerance: int = Field(0, ge=0)

    def detect(self, case: Case) -> Flags:
        """See `Detector.detect`."""
        affected = case.queries.affected.numpy()
        parts = [self._suspicion(case, affected == number) for number in np.unique(affected)]
        if len(parts) <= self.affected_tolerance:
            raise DataError(
                f"detector.affected_tolerance is {self.affected_tolerance}, expected less than "
                f"the number of affected inputs ({len(parts)})"
            )
        agreed = np.partition(parts, self.affected_tolerance, axis=0)[self.affected_tolerance]
        return self.flags(case, agreed, -self.tau)

    def _suspicion(self, case: Case, chosen: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Return minus the (tolerance + 1)-th largest Delta of every row: ``[n]``.

        It exceeds ``-tau`` exactly where the count rule flags, so that one run gives the
        whole precision-recall curve.
        """
        moved = chosen & (case.queries.transform.numpy() >= 0)
        count = int(moved.sum())
        if count <= self.tolerance:
            raise DataError(
                f"detector.tolerance is {self.tolerance}, expected less than the number of "
                f"transforms ({count})"
            )
        original = case.scores[chosen & ~moved]
        delta = case.scores[moved] - original
        rank = count - 1 - self.tolerance
        return -np.partition(delta, rank, axis=0)[rank]
