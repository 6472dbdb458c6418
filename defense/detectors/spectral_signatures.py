"""Spectral Signatures: outliers along the leading direction (Tran et al. 2018; card 3.2)."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.linalg import svd

from defense.detectors.candidates import RowDetector
from defense.prediction import features
from defense.records import Case, Flags

Array = NDArray[np.float32]
TRAN = "expected_fraction", "centred"  # settings of the variants
PAPER = "spectral_threshold", "contribution_threshold", "share"


class SpectralSignatures(RowDetector):
    """Flag rows whose activations stick out along leading singular vectors.

    Attributes:
        variant: ``tran``: per class, the squared projection on the leading right singular
            vector of the centred activations; the share 1.5 x `expected_fraction` of each
            class with the largest is flagged. ``paper``: one decomposition of all activations
            as they are; a row is flagged if its part along singular vectors above
            `spectral_threshold` is longer than `contribution_threshold`, as the
            Delta-Influence authors' code does.
        expected_fraction: Assumed share of poison in a class; 0.1 flags 15 % of each class, as
            in BackdoorBench.
        centred: False projects activations that are not centred, as ART and BackdoorBench do.
        spectral_threshold: The authors' grid is 4, 6, 8, 10; their released run has 7.
        contribution_threshold: The authors' grid is 7, 9, 11, 13; their released run has 7.
            Another model has other units.
        share: Instead of that threshold, the share of all rows that ``paper`` flags; the
            released run flags 0.21.
    """

    name: Literal["spectral_signatures"] = "spectral_signatures"
    variant: Literal["tran", "paper"] = "tran"
    expected_fraction: float = Field(0.1, gt=0, lt=2 / 3)
    centred: bool = True
    spectral_threshold: float = Field(7.0, ge=0)
    contribution_threshold: float = Field(7.0, ge=0)
    share: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _require_own(self) -> "SpectralSignatures":
        fields = type(self).model_fields
        others = PAPER if self.variant == "tran" else TRAN
        unused = [name for name in others if getattr(self, name) != fields[name].default]
        if unused:
            raise ValueError(f"variant {self.variant} has no use for {', '.join(unused)}")
        return self

    def detect(self, case: Case, generator: torch.Generator, scratch: Path | None = None) -> Flags:
        """See `Detector.detect`; with ``tran`` suspicion is in units of the class's cut."""
        seen: Array = features(case.model, case.train).numpy()
        if self.variant == "paper":
            values, vectors = svd(seen, full_matrices=False)[1:]
            kept = vectors[values > self.spectral_threshold]
            lengths = np.linalg.norm(seen @ kept.T, axis=1)
            cut = None if self.share is None else float(np.quantile(lengths, 1 - self.share))
            return self.flags(case, lengths, self.contribution_threshold if cut is None else cut)
        suspicion = np.zeros(len(seen), dtype=np.float32)
        for label in np.unique(case.train.labels):
            rows = case.train.labels == label
            suspicion[rows] = self._class_suspicion(seen[rows])
        return self.flags(case, suspicion, 1.0)

    def _class_suspicion(self, seen: Array) -> Array:
        """Compute squared projections of one class ``[m, d]`` as multiples of the cut."""
        shifted = seen - seen.mean(0)
        leading = svd(shifted, full_matrices=False)[2][0]
        squares: Array = np.square((shifted if self.centred else seen) @ leading)
        count = int(1.5 * self.expected_fraction * len(squares))
        cut = np.sort(squares)[-count - 1]
        if count == 0 or cut <= np.finfo(np.float32).eps * squares.max():
            return np.zeros_like(squares)  # nothing to cut, or rows that are all alike
        return squares / cut
