"""A small model, its fit and its scores, for tests of what is kept of them."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from defense.influence.factors import FactorSettings, fit_factors
from defense.influence.scores import Influence, ScoreSettings, compute_influence
from defense.records import Factors, ImageSet, Queries


def small_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(4),
        nn.Flatten(), nn.Linear(96, 4),
    ).eval()  # fmt: skip


def fit(model: nn.Module, images: ImageSet, scratch: Path | None, **options) -> Factors:
    settings = FactorSettings(**{"batch_size": 8} | options)
    generator = torch.Generator().manual_seed(0)
    return fit_factors(model, images, settings, generator, scratch=scratch)


def score(model: nn.Module, factors: Factors, images: ImageSet, scratch: Path | None) -> Influence:
    nothing = torch.zeros(6, dtype=torch.int64)
    queries = Queries(images.images(np.arange(6)), images.targets(np.arange(6)), nothing, nothing)
    settings = ScoreSettings(batch_size=8)
    return compute_influence(
        model, factors, queries, images, settings, self_influence=True, scratch=scratch
    )


def parts(factors: Factors) -> list[bytes]:
    return [
        part.numpy().tobytes() for layer in factors.layers.values() for part in vars(layer).values()
    ]
