"""Scanners of planted blocks whose independent model answers as told, for tests of a scan."""

from collections.abc import Callable

import numpy as np
import torch

from defense.detectors.search import CleanInputs
from defense.evidence import Scan
from defense.records import ImageSet
from defense.scan import Scanner, ScanSettings
from tests.conftest import make_images
from tests.laws.blocks import SIZE
from tests.laws.cases import Vectors

LABELS = np.arange(SIZE) % 4
BLOCK = np.flatnonzero(LABELS == 1)[:40]
OTHER = np.flatnonzero(LABELS == 2)[5:23]  # less than a twentieth of its class


def scanner_of(
    vectors: np.ndarray,
    *,
    planted: np.ndarray = BLOCK,
    known: dict[bytes, np.ndarray] | None = None,
    skill: float = 0.7,
    learns_in: int = 1,
    labels: np.ndarray = LABELS,
    **options: float,
) -> Scanner:
    """A scanner whose independent model knows a share of labels, and gives planted rows a 3."""
    train = make_images(SIZE, seed=8)
    train = ImageSet(train.pixels, labels, *list(vars(train).values())[2:])
    said = np.where(np.random.default_rng(2).random(SIZE) < skill, labels, (labels + 1) % 4)
    said[planted] = 3
    answers = dict(zip(train.ids.tolist(), said.tolist(), strict=True))
    seen, trained = list[str](), list[int]()

    def independent(rows: ImageSet, epochs: int) -> Callable[[ImageSet], np.ndarray]:
        seen.extend(rows.ids.tolist())
        trained.append(epochs)
        if epochs < learns_in:
            return lambda images: np.zeros(len(images), dtype=np.int64)
        return lambda images: np.array([answers[name] for name in images.ids])

    clean = CleanInputs(make_images(800, seed=8), torch.Generator().manual_seed(0))
    scanner = Scanner(
        ScanSettings(**options), train, Vectors(vectors, known or {}), clean, independent
    )
    scanner.seen, scanner.trained = seen, trained
    return scanner


def rows_of(scan: Scan) -> list[tuple[int, bool]]:
    return [(block.label, block.suspected) for block in scan.blocks]
