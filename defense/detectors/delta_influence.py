"""Delta-Influence: rows whose influence collapses under transforms (method card 3.6)."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from defense.detectors.affected import ScoreDetector
from defense.errors import DataError
from defense.records import Case, Change, Mask


class DeltaInfluence(ScoreDetector):
    """Count rule of Delta-Influence (Li et al. 2024, section 4).

    Delta of a row and a transform is the row's influence on the transformed input with its
    new label minus its influence on the affected input with its predicted label. A row is
    flagged when Delta is below `tau` for all but `tolerance` of the transforms.

    Attributes:
        tau: Threshold on Delta; the paper's grid is 0, -1, -5, -10, -100, the authors'
            CIFAR-100 notebook uses -40.
        tolerance: Transforms that may disagree (``n_tol``); the paper's grid is 0 to 3.
        change: What a transform changes: ``both`` image and label, or as an ablation the
            ``image`` or the ``label`` alone (section 4.2); those need transforms.ablations.
    """

    name: Literal["delta_influence"] = "delta_influence"
    tau: float = Field(0.0, le=0)
    tolerance: int = Field(1, ge=0)
    change: Change = "both"

    @property
    def limit(self) -> float:
        """See `ScoreDetector.limit`."""
        return -self.tau

    def suspicion(self, case: Case, chosen: Mask) -> NDArray[np.float32]:
        """See `ScoreDetector.suspicion`: minus the (tolerance + 1)-th largest Delta.

        It exceeds ``-tau`` exactly where the count rule flags, so that one run gives the
        whole precision-recall curve.
        """
        moved = chosen & case.queries.changed(self.change)
        count = int(moved.sum())
        if count <= self.tolerance:
            raise DataError(
                f"detector.tolerance is {self.tolerance}, expected less than the number of "
                f"transforms that change {self.change} ({count}); see transforms.num_transforms "
                "and transforms.ablations"
            )
        original = case.scores[chosen & case.queries.changed("none")]
        delta = case.scores[moved] - original
        rank = count - 1 - self.tolerance
        return -np.partition(delta, rank, axis=0)[rank]
