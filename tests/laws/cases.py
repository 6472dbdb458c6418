"""Small cases that tests put to detectors: rows that stand out, and directions that are given."""

import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from defense.contracts import Detector
from defense.records import Case, Flags, ImageSet, Queries
from tests.conftest import make_images

ROWS = 48


def planted_rows(train: ImageSet) -> np.ndarray:
    return (train.labels == 1) & (np.arange(len(train)) % 8 == 1)


class Flat(nn.Module):
    """Averages blocks of pixels and adds a linear layer that knows classes and a trigger."""

    def __init__(self, train: ImageSet, planted: np.ndarray) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(8)
        self.linear = nn.Linear(192, 4)
        seen = self.pool(train.images()).flatten(1)
        with torch.no_grad():
            for label in range(4):
                chosen = torch.from_numpy((train.labels == label) & ~planted)
                self.linear.weight[label] = 4 * seen[chosen].mean(0)
                self.linear.bias[label] = -2 * seen[chosen].mean(0).square().sum()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.pool(images).flatten(1))


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class Vectors:
    """Directions that are given; an input that is not known has one of its own."""

    given: np.ndarray
    known: dict[bytes, np.ndarray]

    @property
    def self_influence(self) -> np.ndarray:
        return np.ones(len(self.given), dtype=np.float32)

    def take(self, rows: np.ndarray) -> "Vectors":
        return replace(self, given=self.given[rows])

    def rows(self, rows: np.ndarray) -> np.ndarray:
        return self.towards(self.given[rows])

    def vectors(self, images: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
        keys = [image.contiguous().numpy().tobytes() for image in images]
        return np.stack([self.known.get(key, self.other(key)) for key in keys])

    def towards(self, vectors: np.ndarray) -> np.ndarray:
        return unit(vectors) @ unit(self.given).T

    def other(self, key: bytes) -> np.ndarray:
        return unit(np.random.default_rng(zlib.crc32(key)).normal(size=self.given.shape[1]))


def vectors_of(train: ImageSet, planted: np.ndarray, affected: torch.Tensor) -> Vectors:
    """Planted rows and the affected input have a part in common."""
    rng = np.random.default_rng(7)
    common = 6 * np.eye(64)[0]
    vectors = unit(rng.normal(size=(len(train), 64)) + np.outer(planted, common))
    own = unit(rng.normal(size=64) + common)
    return Vectors(vectors, {affected.contiguous().numpy().tobytes(): own})


def make_case(*, affected: int = 1, transforms: int = 9, rows: int = ROWS) -> Case:
    """Random scores and images; some rows of the predicted label stand out in both."""
    rng = np.random.default_rng(3)
    train = make_images(rows, seed=8)
    planted = planted_rows(train)
    train.pixels[planted] = 255 - train.pixels[planted]
    changes = torch.tensor([0] + [1] * transforms + [2] * transforms + [3] * transforms)
    change = changes.repeat(affected)
    labels = torch.where((change == 0) | (change == 2), 1, 2)
    queries = Queries(
        torch.from_numpy(train.pixels[planted][:1] / np.float32(255)).expand(
            len(change), -1, -1, -1
        ),
        labels,
        torch.arange(affected).repeat_interleave(len(changes)),
        change,
    )
    scores = rng.normal(size=(len(change), rows)).astype(np.float32)
    scores[np.ix_(change.numpy() == 0, planted)] += 100
    directions = vectors_of(train, planted, queries.images[0])
    controls = make_images(240, seed=8)
    return Case(train, Flat(train, planted).eval(), queries, scores, directions, controls)


def detect(detector: Detector, case: Case) -> Flags:
    return detector.detect(case, torch.Generator().manual_seed(5))
