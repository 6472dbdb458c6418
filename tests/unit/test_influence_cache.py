"""Kept factors and scores: found again, never stale, never damaged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from defense.checkpoints import digest_of_images
from defense.errors import ArtifactError
from defense.influence.cache import cached_factors, cached_influence
from defense.influence.factors import FactorSettings
from defense.influence.network import Network
from defense.influence.scores import Influence, ScoreSettings, compute_influence
from defense.influence.store import StoreSettings
from defense.influence.task import CLASSIFICATION, Classification
from defense.records import ImageSet, Queries
from tests.conftest import KilledError, make_images
from tests.unit.fits import fit, parts, score, small_model


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


@pytest.mark.parametrize("most", [None, 10])
def test_randomness_goes_on_the_same_whether_factors_were_kept(
    most: int | None, tmp_path: Path
) -> None:
    model, images, after = small_model(), make_images(48, seed=4), []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        cached_factors(tmp_path, model, images, FactorSettings(max_rows=most), generator)
        after.append(torch.rand(1, generator=generator).item())
    assert after[0] == after[1]


def relabelled(images: ImageSet) -> ImageSet:
    """Give the last image another label."""
    labels = images.labels.copy()
    labels[-1] = (labels[-1] + 1) % 4
    return ImageSet(images.pixels, labels, *list(vars(images).values())[2:])


def reshaped(images: ImageSet) -> ImageSet:
    """Keep every byte, in other rows of pixels."""
    size = len(images), 3, images.shape[1] // 2, images.shape[2] * 2
    return ImageSet(images.pixels.reshape(size), *list(vars(images).values())[1:])


class Renamed(Classification):
    """Another task with the same results."""


@pytest.mark.parametrize("by", ["cache", "checkpoint"])
def test_another_question_about_rows_is_not(by: str, tmp_path: Path, kill_after) -> None:
    """Whatever the scores depend on, the model apart, which the factors are bound to."""
    model, images = small_model(), make_images(48, seed=4)
    factors, other = (fit(model, images, None, batch_size=size) for size in (8, 12))
    nothing, numbers = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    queries = Queries(images.images(slice(3)), images.targets(slice(3)), nothing, nothing)
    usual = {
        "queries": queries, "images": images, "settings": ScoreSettings(batch_size=8),
        "factors": factors, "task": CLASSIFICATION, "dampings": (), "self_influence": False,
    }  # fmt: skip

    def ask(**options) -> Influence:
        chosen = usual | options
        first = (chosen.pop(name) for name in ("factors", "queries", "images", "settings", "task"))
        if by == "cache":
            return cached_influence(tmp_path, model, *first, **chosen)
        return compute_influence(model, *first, **chosen, scratch=tmp_path)

    batches = kill_after(None)
    ask()
    expected = len(batches)
    for label, changed in {
        "images of queries": {"queries": replace(queries, images=queries.images.flip(3))},
        "labels of queries": {"queries": replace(queries, labels=(queries.labels + 1) % 4)},
        "order of queries": {"queries": replace(queries, images=queries.images[numbers.flip(0)])},
        "labels": {"images": relabelled(images)},
        "rows": {"images": images.take(np.arange(48)[::-1].copy())},
        "damping": {"settings": ScoreSettings(batch_size=8, damping=0.2)},
        "dampings": {"dampings": (0.1, 0.2)},
        "self-influence": {"self_influence": True},
        "factors": {"factors": other},
        "task": {"task": Renamed()},
    }.items():
        batches.clear()
        ask(**changed)
        assert len(batches) >= expected, label


def test_bytes_in_another_shape_are_other_images() -> None:
    images = make_images(8, seed=4)
    assert digest_of_images(images) != digest_of_images(reshaped(images))


@pytest.mark.parametrize("by", ["cache", "checkpoint"])
def test_nothing_of_other_code_is_used(by: str, tmp_path: Path, kill_after, monkeypatch) -> None:
    model, images = small_model(), make_images(48, seed=4)
    counts, batches = [], kill_after(None)
    for code in (b"old", b"old", b"new"):
        monkeypatch.setattr("defense.influence.products.CODE", code)
        batches.clear()
        if by == "cache":
            influence_of(tmp_path, model, factors_of(tmp_path, model, images), images)
        else:
            score(model, fit(model, images, tmp_path), images, tmp_path)
        counts.append(len(batches))
    assert counts[0] == counts[2] > counts[1]


def test_another_question_about_a_model_is_not(tmp_path: Path, batches: list[int]) -> None:
    model, images, other = small_model(), make_images(48, seed=4), small_model()
    factors_of(tmp_path, model, images)
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-3
    for question in (
        lambda: factors_of(tmp_path, model, relabelled(images)),
        lambda: factors_of(tmp_path, other, images),
        lambda: factors_of(tmp_path, model, images, seed=1),
        lambda: factors_of(tmp_path, model, images, fisher="empirical"),
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
    kill_after(5)
    with pytest.raises(KilledError):
        factors_of(tmp_path, model, images, batch_size=8)
    assert [path.suffix for path in tmp_path.iterdir()] == [".unfinished"]
    rest = kill_after(None)
    factors = factors_of(tmp_path, model, images, batch_size=8)
    continued = len(rest)
    rest.clear()
    expected = factors_of(tmp_path / "other", model, images, batch_size=8)
    assert continued == len(rest) - 2  # the batches that were kept; check and forecast come first
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
