"""Small worlds the tests share: synthetic images with a planted, learnable class signal."""

import os

import numpy as np
import pytest
import torch

from defense.influence.network import Network
from defense.records import ImageSet, Split, image_set

os.environ["DEFENSE_DEVICE"] = "cpu"
torch.set_num_threads(2)


def make_images(count: int, *, seed: int, classes: int = 4, shape=(3, 16, 16)) -> ImageSet:
    """Noise with one bright square per class, so that a small network learns it fast."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    pixels = rng.integers(0, 80, (count, *shape), dtype=np.uint8)
    for row, label in enumerate(labels):
        top, left = 2 + 5 * (label // 2), 2 + 5 * (label % 2)
        pixels[row, :, top : top + 4, left : left + 4] += 120
    ids = np.array([f"s{seed}/{row:04d}" for row in range(count)])
    return image_set(pixels, labels.astype(np.int64), ids, tuple("abcdefghij"[:classes]))


@pytest.fixture(scope="session")
def split() -> Split:
    return Split(make_images(160, seed=1), make_images(80, seed=2))


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch):
    """Return a function that lets a number of batches pass, saving after each."""
    monkeypatch.setattr("defense.checkpoints.CHECKPOINT_SECONDS", 0.0)
    original = Network.rows

    def arm(count: int | None) -> list[int]:
        seen: list[int] = []

        def rows(self, images, numbers):
            if count is not None and len(seen) == count:
                raise KilledError
            seen.append(len(numbers))
            return original(self, images, numbers)

        monkeypatch.setattr(Network, "rows", rows)
        return seen

    return arm
