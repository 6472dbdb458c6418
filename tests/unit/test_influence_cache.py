"""Kept factors and scores: found again, never stale, never damaged."""

from pathlib import Path

import numpy as np
import pytest
import torch

from defense.errors import ArtifactError
from defense.influence.cache import cached_factors, cached_influence
from defense.influence.factors import FactorSettings
from defense.influence.network import Network
from defense.influence.scores import ScoreSettings
from defense.influence.store import StoreSettings
from defense.records import ImageSet, Queries
from tests.conftest import KilledError, make_images
from tests.unit.test_resume import parts, small_model


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry for every batch that is run."""
    seen: list[int] = []
    original = Network.rows
    monkeypatch.setattr(
        Network, "rows", lambda self, *args: seen.append(1) or original(self, *args)
    )
    return seen


def factors_of(folder: Path, model, images, seed: int = 0, **options):
    generator = torch.Generator().manual_seed(seed)
    return cached_factors(folder, model, images, FactorSettings(**options), generator)


def influence_of(folder: Path, model, factors, images, **options):
    nothing = torch.zeros(3, dtype=torch.int64)
    queries = Queries(images.images(np.arange(3)), images.targets(np.arange(3)), nothing, nothing)
    return cached_influence(folder, model, factors, queries, images, ScoreSettings(**options))


def test_the_same_question_is_answered_once(tmp_path: Path, batches: list[int]) -> None:
    model, images = small_model(), make_images(48, seed=4)
    first = factors_of(tmp_path, model, images)
    influence = influence_of(tmp_path, model, first, images)
    batches.clear()
    second = factors_of(tmp_path, model, images)
    again = influence_of(tmp_path, model, second, images)
    assert batches == []
    assert parts(first) == parts(second)
    for one, other in zip(vars(influence).values(), vars(again).values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_question_is_not(tmp_path: Path, batches: list[int]) -> None:
    model, images = small_model(), make_images(48, seed=4)
    factors = factors_of(tmp_path, model, images)
    influence_of(tmp_path, model, factors, images)
    labels = images.labels.copy()
    labels[0] = (labels[0] + 1) % 4
    relabelled = ImageSet(images.pixels, labels, *list(vars(images).values())[2:])
    other = small_model()
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-3
    for question in (
        lambda: factors_of(tmp_path, model, relabelled),
        lambda: factors_of(tmp_path, other, images),
        lambda: factors_of(tmp_path, model, images, seed=1),
        lambda: factors_of(tmp_path, model, images, fisher="empirical"),
        lambda: influence_of(tmp_path, model, factors, relabelled),
        lambda: influence_of(tmp_path, model, factors, images, damping=0.2),
    ):
        batches.clear()
        question()
        assert batches


def test_factors_of_another_model_are_refused(tmp_path: Path) -> None:
    model, images, other = small_model(), make_images(48, seed=4), small_model()
    factors = factors_of(tmp_path, model, images)
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(ArtifactError, match="fitted on another model"):
        influence_of(tmp_path, other, factors, images)
    with pytest.raises(ArtifactError, match="fitted on another model"):
        StoreSettings().sketcher(other, factors)


def test_a_killed_computation_continues_and_leaves_nothing_behind(tmp_path, kill_after) -> None:
    model, images = small_model(), make_images(48, seed=4)
    kill_after(4)
    with pytest.raises(KilledError):
        factors_of(tmp_path, model, images, batch_size=8)
    assert [path.suffix for path in tmp_path.iterdir()] == [".unfinished"]
    rest = kill_after(None)
    factors = factors_of(tmp_path, model, images, batch_size=8)
    continued = len(rest)
    rest.clear()
    expected = factors_of(tmp_path / "other", model, images, batch_size=8)
    assert continued == len(rest) - 3  # the batches that were kept; a forecast's rows come first
    assert parts(factors) == parts(expected)
    assert [path.suffix for path in tmp_path.glob("factors-*")] == [""]


@pytest.mark.parametrize("kind", ["factors", "influence"])
def test_a_damaged_result_is_computed_again(kind: str, tmp_path: Path, batches) -> None:
    model, images = small_model(), make_images(48, seed=4)
    factors = factors_of(tmp_path, model, images)
    influence = influence_of(tmp_path, model, factors, images)
    (folder,) = tmp_path.glob(f"{kind}-*")
    file = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    batches.clear()
    warned = pytest.warns(UserWarning, match="computing again: .* was truncated or edited")
    if kind == "factors":
        with warned:
            again = factors_of(tmp_path, model, images)
        assert parts(again) == parts(factors)
    else:
        with warned:
            repeated = influence_of(tmp_path, model, factors, images)
        np.testing.assert_array_equal(repeated.margin, influence.margin)
    assert batches
