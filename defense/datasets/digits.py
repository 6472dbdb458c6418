"""Scikit-learn's bundled handwritten digits: 1,797 grey images of 8x8 pixels, no download."""

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from defense.contracts import DataSource
from defense.datasets.selection import stratified
from defense.records import Split, image_set

BRIGHTEST = 16  # the source stores ink from 0 to 16


class Digits(DataSource):
    """The digits set, split at random into train and test rows.

    Attributes:
        test_size: Rows held out for testing.
        train_size: Rows of the others to keep; None keeps all.
    """

    name: Literal["digits"] = "digits"
    test_size: int = Field(360, ge=10)
    train_size: int | None = Field(None, ge=10)

    def load(self, generator: torch.Generator) -> Split:
        """See `DataSource.load`."""
        from sklearn.datasets import load_digits  # slow to import, needed here alone

        bunch = load_digits()
        labels = bunch.target.astype(np.int64)
        test = stratified(labels, self.test_size, generator, role="test_size")
        rest = np.setdiff1d(np.arange(len(labels)), test)
        kept = stratified(labels[rest], self.train_size, generator, role="train_size")
        pixels = np.rint(bunch.images * (255 / BRIGHTEST)).astype(np.uint8)[:, None]
        ids = np.array([f"digits/{row:04d}" for row in range(len(labels))])
        names = tuple(str(name) for name in bunch.target_names)
        train_set, test_set = (
            image_set(pixels[rows], labels[rows], ids[rows], names) for rows in (rest[kept], test)
        )
        return Split(train_set, test_set)
