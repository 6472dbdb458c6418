"""Rules that judge one affected input after the other, and what they make of several."""

from abc import abstractmethod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from defense.detectors.candidates import RowDetector, narrowed, require_finite
from defense.errors import DataError
from defense.records import Case, Flags, Mask


class ScoreDetector(RowDetector):
    """A rule on influence scores that flags a row if enough affected inputs agree.

    Attributes:
        affected: Use only the first so many affected inputs; None uses all.
        affected_tolerance: Of several affected inputs, those that may disagree; 0 is the
            paper's intersection (section 6.1).
    """

    affected: int | None = Field(None, gt=0)
    affected_tolerance: int = Field(0, ge=0)

    @abstractmethod
    def suspicion(self, case: Case, chosen: Mask) -> NDArray[np.float32]:
        """Judge every row by one affected input.

        Args:
            case: All a detector may know.
            chosen: bool ``[q]``; the queries of the affected input.

        Returns:
            float32 ``[n]``.
        """

    @property
    @abstractmethod
    def limit(self) -> float:
        """Suspicion above which a row is flagged."""

    def detect(self, case: Case, generator: torch.Generator, scratch: Path | None = None) -> Flags:
        """See `Detector.detect`."""
        case = narrowed(case, self.affected)
        require_finite(case.scores, "influence")
        affected = case.queries.affected.numpy()
        numbers = np.unique(affected)
        if len(numbers) <= self.affected_tolerance:
            raise DataError(
                f"detector.affected_tolerance is {self.affected_tolerance}, expected less than "
                f"the number of affected inputs ({len(numbers)})"
            )
        parts = np.stack([self.suspicion(case, affected == number) for number in numbers])
        return self.flags(case, self.agree(parts), self.limit)

    def agree(self, parts: NDArray[np.float32]) -> NDArray[np.float32]:
        """Make one suspicion ``[n]`` of those of several affected inputs ``[m, n]``."""
        agreed: NDArray[np.float32] = np.partition(parts, self.affected_tolerance, axis=0)
        return agreed[self.affected_tolerance]
