"""The row store: cosines from short vectors, for queries, rows, and rows it has not seen."""

from pathlib import Path

import numpy as np
import pytest
import torch

from defense.errors import ArtifactError
from defense.influence import store
from defense.influence.directions import query_store
from defense.influence.scores import ScoreSettings, compute_influence
from defense.influence.sketch import FOLD, Sketcher
from defense.influence.store import (
    RowStore,
    StoreSettings,
    build_store,
    load_store,
)
from defense.records import Queries
from tests.conftest import KilledError, make_images
from tests.unit.fits import fit, small_model

WIDE = StoreSettings(components=96, sketch=2**16, batch_size=16)


@pytest.fixture(scope="module")
def problem():
    model, images = small_model(), make_images(96, seed=4)
    return model, images, fit(model, images, None, tier="exact")


def queries_of(images, count: int) -> Queries:
    other = make_images(count, seed=9)
    nothing = torch.zeros(count, dtype=torch.int64)
    return Queries(other.images(), other.targets(), nothing, nothing)


def direct(problem, queries: Queries) -> np.ndarray:
    model, images, factors = problem
    settings = ScoreSettings(batch_size=16)
    return compute_influence(
        model, factors, queries, images, settings, self_influence=True
    ).cosine()[0]


def stored(problem, settings: StoreSettings, queries: Queries) -> tuple[RowStore, np.ndarray]:
    model, images, factors = problem
    built = build_store(model, factors, images, settings)
    return built, query_store(built, built.sketcher(model, factors), queries)


@pytest.mark.parametrize("probe", [96, 64])
def test_cosines_of_queries(problem, probe: int) -> None:
    queries = queries_of(problem[1], 8)
    settings = WIDE.model_copy(update={"probe": probe})
    built, cosines = stored(problem, settings, queries)
    assert built.rows.shape == (96, min(96, probe))
    assert built.rows.dtype == np.float16
    expected = direct(problem, queries)
    assert np.corrcoef(cosines.ravel(), expected.ravel())[0, 1] > 0.97


def test_rows_against_rows(problem) -> None:
    _, images, _ = problem
    nothing = torch.zeros(96, dtype=torch.int64)
    expected = direct(problem, Queries(images.images(), images.targets(), nothing, nothing))
    built, _ = stored(problem, WIDE, queries_of(images, 1))
    between = built.between(np.arange(96))
    np.testing.assert_allclose(np.diagonal(between), 1, atol=0.01)
    assert np.corrcoef(between.ravel(), expected.ravel())[0, 1] > 0.98


def test_fewer_components_and_coarser_sketches_are_worse(problem) -> None:
    queries = queries_of(problem[1], 8)
    expected = direct(problem, queries)
    errors = [
        np.abs(stored(problem, WIDE.model_copy(update=change), queries)[1] - expected).mean()
        for change in ({}, {"components": 2}, {"sketch": 64})
    ]
    assert errors[0] < min(errors[1:])


def test_a_store_is_kept_and_refuses_another_sketcher(problem, tmp_path: Path) -> None:
    model, _, factors = problem
    queries = queries_of(problem[1], 4)
    built, cosines = stored(problem, WIDE, queries)
    built.save(tmp_path / "store")
    kept = load_store(tmp_path / "store")
    answered = query_store(kept, kept.sketcher(model, factors), queries)
    np.testing.assert_array_equal(answered, cosines)
    np.testing.assert_array_equal(kept.self_influence, built.self_influence)
    for change in ({"seed": 1}, {"damping": 10.0}):
        other = WIDE.model_copy(update=change).sketcher(model, factors)
        other.keep(kept.kept)
        with pytest.raises(ArtifactError, match="expected a sketcher made by this store"):
            query_store(kept, other, queries)
    changed = fit(model, problem[1], None, tier="fast")
    with pytest.raises(ArtifactError, match="other factors, another task or by other code"):
        kept.sketcher(model, changed)
    file = tmp_path / "store" / "rows.npy"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ArtifactError, match="truncated or edited"):
        load_store(tmp_path / "store")


def test_the_strongest_coordinates_are_better_than_random_ones(problem) -> None:
    model, images, factors = problem
    queries = queries_of(images, 8)
    expected = direct(problem, queries)
    narrow = WIDE.model_copy(update={"sketch": 64})
    sketcher = narrow.sketcher(model, factors)
    strongest = sketcher.strongest(images, 16)
    assert len(strongest) == FOLD * 64 < sketcher.count
    assert (np.diff(strongest) > 0).all()
    drawn = np.random.default_rng(0).permutation(sketcher.count)[: FOLD * 64]
    agreement = []
    for kept in (strongest, np.sort(drawn)):
        sketcher.keep(kept)
        rows, asked = (
            sketcher.sketches(x, y)[0]
            for x, y in ((images.images(), images.targets()), (queries.images, queries.labels))
        )
        cosines = (asked @ rows.T).numpy()
        agreement.append(np.corrcoef(cosines.ravel(), expected.ravel())[0, 1])
    assert agreement[0] > agreement[1]


@pytest.mark.parametrize(
    ("where", "count", "left"),
    [
        ("sketches", 4, 9 - 3),  # batches of 8: 6 of probe rows, then 3 blocks of 2
        ("sketches", 9, 9 - 8),
        ("product", 2, 3 * 2 - 1),  # blocks of columns: inner products, then components
        ("product", 5, 3 * 2 - 4),
    ],
)
def test_a_killed_store_continues_with_the_same_bytes(
    where, count, left, problem, tmp_path, monkeypatch
) -> None:
    model, images, factors = problem
    settings = StoreSettings(components=32, sketch=96, batch_size=8, probe=48)
    images = images.where(np.arange(96) < 72)
    monkeypatch.setattr("defense.influence.store.COLUMNS", 32)
    monkeypatch.setattr("defense.influence.store.GATHER", 1)
    undisturbed = build_store(model, factors, images, settings)
    monkeypatch.setattr("defense.checkpoints.CHECKPOINT_SECONDS", 0.0)
    place = Sketcher if where == "sketches" else store
    original, seen = getattr(place, where), []

    def killed(*args):
        seen.append(1)
        if len(seen) == count:
            raise KilledError
        return original(*args)

    monkeypatch.setattr(place, where, killed)
    with pytest.raises(KilledError):
        build_store(model, factors, images, settings, scratch=tmp_path)
    seen[:] = [1] * count  # no second kill
    continued = build_store(model, factors, images, settings, scratch=tmp_path)
    for name in ("rows", "self_influence", "components", "kept"):
        np.testing.assert_array_equal(getattr(continued, name), getattr(undisturbed, name))
    assert len(seen) == count + left
    assert continued.images == undisturbed.images
