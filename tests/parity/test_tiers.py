"""The fast tier against the exact one, in bfloat16 whatever the hardware multiplies in."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from defense.influence.factors import FactorSettings, fit_factors
from defense.influence.scores import ScoreSettings, compute_influence
from defense.influence.task import Classification, cotangents
from defense.records import ImageSet, Queries
from tests.conftest import make_images


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return make_images(256, seed=4)


@pytest.fixture(scope="module")
def model(images: ImageSet) -> nn.Module:
    """Trained until it is sure of most rows, not of all."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(4), nn.Flatten(), nn.Linear(256, 4),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images.images()), images.targets()).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(autouse=True)
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("factors", "metric"):
        monkeypatch.setattr(f"defense.influence.{module}.heavy_dtype", lambda _: torch.bfloat16)


class Recorded(Classification):
    """Remembers the targets it drew."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []

    def sample(self, outputs: Tensor, draws: Tensor) -> Tensor:
        self.drawn.append(super().sample(outputs, draws))
        return self.drawn[-1]

    def digest(self) -> bytes:
        return b"recorded"


def loss_scores(model: nn.Module, images: ImageSet, tier: str) -> np.ndarray:
    settings = FactorSettings(tier=tier, tolerance=1e-3)
    factors = fit_factors(model, images, settings, torch.Generator().manual_seed(0))
    nothing, rows = torch.zeros(8, dtype=torch.int64), np.arange(8)
    queries = Queries(images.images(rows), images.targets(rows), nothing, nothing)
    return compute_influence(model, factors, queries, images, ScoreSettings()).loss()[0]


def test_fast_ranks_rows_as_exact_does(model: nn.Module, images: ImageSet) -> None:
    exact, fast = (loss_scores(model, images, tier) for tier in ("exact", "fast"))
    assert not np.array_equal(exact, fast)
    assert spearmanr(exact.ravel(), fast.ravel())[0] > 0.99


def test_rows_that_are_left_out_hold_what_is_said(model: nn.Module, images: ImageSet) -> None:
    """Every later pass uses the targets that the rows were weighed by."""
    task = Recorded()
    settings = FactorSettings(tolerance=0.05)
    factors = fit_factors(model, images, settings, torch.Generator().manual_seed(0), task)
    targets = torch.cat(task.drawn)
    assert len(targets) == len(images)  # drawn once, in the first pass
    with torch.no_grad():
        slopes = cotangents(task.loss, model(images.images()), targets).square().sum(1)
    kept = slopes.sort(descending=True).values[: factors.num_differentiated].sum()
    assert factors.num_differentiated < 0.75 * len(images)
    assert factors.left_out <= 0.05
    assert 1 - float(kept / slopes.sum()) == pytest.approx(factors.left_out, abs=0.005)
