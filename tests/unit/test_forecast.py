"""What is told before the work starts, and the memory limit."""

import logging
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from defense.errors import DataError, DefenseError
from defense.influence.factors import FactorSettings, fit_factors
from defense.influence.scores import ScoreSettings, compute_influence
from defense.records import Queries
from tests.conftest import make_images

ROOT = Path(__file__).parents[2]
MAC = sys.platform == "darwin"


def small_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(128, 4)
    ).eval()


def queries_of(images, count: int) -> Queries:
    nothing = torch.zeros(count, dtype=torch.int64)
    rows = np.arange(count)
    return Queries(images.images(rows), images.targets(rows), nothing, nothing)


def peak_memory() -> float:
    """Peak of this program in KiB; that of getrusage starts at its parent's memory on Linux."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if MAC else 1)
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return float(line.split()[1])


def run(settings: ScoreSettings, limit: float | None = None):
    model, images = small_model(), make_images(40, seed=1)
    generator = torch.Generator().manual_seed(0)
    factors = fit_factors(model, images, FactorSettings(memory_limit=limit), generator)
    return compute_influence(model, factors, queries_of(images, 12), images, settings)


def test_orders_time_and_memory_are_told_first(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "defense"):
        run(ScoreSettings())
    assert [r.phase for r in caplog.records if hasattr(r, "phase")] == [
        "covariances", "eigendecompositions", "lambda", "queries", "rows",
    ]  # fmt: skip
    factors, scores = (r.getMessage() for r in caplog.records if not hasattr(r, "phase"))
    assert factors.startswith("EK-FAC factors, fast, if all rows are needed: about ")
    assert "GiB in 3 passes with batches of 64" in factors
    assert "4  4 x 129 at 1 positions  lambda Gramian" in factors
    assert scores.startswith("scores, 12 queries: about ")
    assert "0  8 x 28 at 256 positions  queries " in scores


def test_a_limit_below_what_is_needed_is_refused() -> None:
    with pytest.raises(DefenseError, match=r"memory_limit is 0.01 GiB, but at least .* needed"):
        run(ScoreSettings(), limit=0.01)
    with pytest.raises(DefenseError, match=r"memory_limit is 0.01 GiB, but at least .* needed"):
        run(ScoreSettings(memory_limit=0.01))


def test_groups_of_queries_give_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(ScoreSettings())
    monkeypatch.setattr("defense.influence.forecast._passes", lambda *_: (5, 64))
    parts = run(ScoreSettings())
    np.testing.assert_allclose(parts.margin, whole.margin, rtol=1e-5)
    np.testing.assert_allclose(parts.query_norm, whole.query_norm, rtol=1e-6)


def test_norms_that_were_not_asked_for_are_missed() -> None:
    with pytest.raises(DataError, match="pass self_influence=True"):
        run(ScoreSettings()).cosine()


def test_nothing_to_score_is_said() -> None:
    model, images = small_model(), make_images(40, seed=1)
    factors = fit_factors(model, images, FactorSettings(), torch.Generator().manual_seed(0))
    nobody = images.where(images.labels < 0)
    with pytest.raises(DataError, match="expected rows to fit the factors on, got none"):
        fit_factors(model, nobody, FactorSettings(), torch.Generator())
    for count, rows in ((0, images), (3, images.where(images.labels < 0))):
        with pytest.raises(DataError, match="expected rows to score and queries, got"):
            compute_influence(model, factors, queries_of(images, count), rows, ScoreSettings())


PROGRAM = """
import sys
import torch
from torch import nn
from defense.influence.factors import FactorSettings, fit_factors
from defense.influence.forecast import GIB, resident
from defense.influence.scores import ScoreSettings, compute_influence
from tests.conftest import make_images
from tests.unit.test_forecast import peak_memory, queries_of

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 4),
)
images = make_images(512, seed=1, shape=(3, 32, 32))
fit_factors(model, images.where(images.labels == 0), FactorSettings(batch_size=1),
            torch.Generator().manual_seed(0))  # brings in all code first
extra = float(sys.argv[1])
limit = resident() / GIB + extra if extra else None
for tier in ("fast", "exact"):
    factors = fit_factors(
        model, images, FactorSettings(tier=tier, batch_size=512, memory_limit=limit),
        torch.Generator().manual_seed(0),
    )
settings = ScoreSettings(batch_size=512, memory_limit=limit)
compute_influence(model, factors, queries_of(images, 200), images, settings)
compute_influence(model, factors, queries_of(images, 9), images, settings, self_influence=True,
                  dampings=tuple(0.1 * 2**k for k in range(20)))
peak = peak_memory() / 2**20
print(peak - (limit or 0))
"""


def excess(extra: float) -> float:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(extra)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def test_the_memory_limit_is_held() -> None:
    unlimited = excess(0.0)
    assert unlimited > 1.5  # GiB, so that the limit below has something to hold
    assert excess(0.75) <= 0


MATRIX = """
import sys
import numpy as np, torch
from torch import nn
from defense.influence.factors import FactorSettings, fit_factors
from defense.influence.scores import ScoreSettings, compute_influence
from tests.conftest import make_images
from tests.unit.test_forecast import peak_memory, queries_of

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
images = make_images(4000, seed=1, shape=(3, 2, 2))
rows = images.take(np.arange(int(sys.argv[1])) % 4000)
factors = fit_factors(model, images, FactorSettings(), torch.Generator().manual_seed(0))
influence = compute_influence(model, factors, queries_of(images, 2000), rows, ScoreSettings())
loss = influence.loss()
assert loss.shape == (1, 2000, len(rows))
np.testing.assert_allclose(loss[0, 7, :9], influence.margin[0, 7, :9] * influence.loss_scale[:9])
print(peak_memory() / 2**10)
"""


def test_the_score_matrix_does_not_stay_in_memory() -> None:
    peaks = [
        float(subprocess.run(
            [sys.executable, "-c", MATRIX, str(rows)],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.split()[-1])
        for rows in (4000, 32000)
    ]  # fmt: skip
    assert peaks[1] - peaks[0] < 50  # MiB, of 2 x 213 MiB that the larger matrices have more
