"""Training sets with planted blocks of directions, for tests of the default detector."""

import numpy as np
import torch

from defense.detectors.normalised_influence import NormalisedInfluence
from defense.evidence import Incident
from defense.records import Case, Flags, ImageSet, Queries
from tests.conftest import make_images
from tests.laws.cases import Flat, Vectors, unit

SIZE, WIDTH = 2000, 256
LABELS = np.where(np.arange(SIZE) < 1600, 1, np.arange(SIZE) % 4)
BLOCK = np.arange(0, 200, 5)  # 40 rows of class 1
OTHER = np.arange(1, 300, 6)  # 50 others


def vectors_with(*blocks: np.ndarray, strength: float = 12.0) -> np.ndarray:
    """Random unit vectors; those of a block have a part in common."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(SIZE, WIDTH))
    for axis, block in enumerate(blocks):
        vectors[block, axis] += strength
    return unit(vectors)


def towards(axis: int | None, seed: int, strength: float = 12.0) -> np.ndarray:
    vector = np.random.default_rng(seed).normal(size=WIDTH)
    if axis is not None:
        vector[axis] += strength
    return unit(vector)


def case_of(vectors: np.ndarray, affected: list[np.ndarray], labels: np.ndarray) -> Case:
    """Rows of class 1 with these directions, other rows with labels of their own."""
    train = make_images(SIZE, seed=8)
    train = ImageSet(train.pixels, labels, *list(vars(train).values())[2:])
    images = make_images(len(affected), seed=21).images()
    known = {
        image.contiguous().numpy().tobytes(): vector
        for image, vector in zip(images, affected, strict=True)
    }
    numbers = torch.arange(len(affected))
    queries = Queries(images, torch.ones(len(affected), dtype=torch.int64), numbers, numbers * 0)
    nothing = np.zeros((len(affected), SIZE), np.float32)
    model = Flat(train, np.zeros(SIZE, bool)).eval()
    return Case(train, model, queries, nothing, Vectors(vectors, known), make_images(800, seed=8))


def detect(case: Case, **options) -> Flags:
    rule = NormalisedInfluence(**options)
    return rule.detect(case, torch.Generator().manual_seed(5))


def of_inputs(flags: Flags) -> Incident:
    """Take the only incident that affected inputs are of."""
    (incident,) = [incident for incident in flags.incidents if incident.affected]
    return incident
