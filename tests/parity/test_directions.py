"""Stored directions against explicit per-sample gradients, and what a resumed run gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from defense.errors import ArtifactError, NumericalError
from defense.influence.directions import StoredDirections
from defense.influence.layers import find_layers, flat_gradient
from defense.influence.sketch import Sketcher
from defense.influence.store import DirectionSettings, StoreSettings, build_store, load_store
from defense.records import Factors
from tests.conftest import KilledError, make_images
from tests.unit.fits import fit, small_model

LEADING = DirectionSettings(leading=(16, 3), sketch=2**14, batch_size=8).store()


@pytest.fixture(scope="module")
def problem():
    model, images = small_model(), make_images(40, seed=4)
    return model, images, fit(model, images, None, tier="exact")


def explicit(model: nn.Module, factors: Factors, images: torch.Tensor, labels: torch.Tensor):
    """Unit margin gradients in the span of leading eigenvectors, by autograd: ``[n, k]``."""
    vectors = []
    for image, label in zip(images, labels, strict=True):
        logits = model(image[None])[0]
        others = logits[torch.arange(len(logits)) != label]
        model.zero_grad()
        (logits[label] - others.logsumexp(0)).backward()
        parts = []
        for name, layer in find_layers(model).items():
            known = factors.layers[name]
            level = LEADING.damping * known.lambda_matrix.mean()
            part = (known.lambda_matrix / (known.lambda_matrix + level))[0]
            columns = part.sum(0).topk(16).indices
            rows = part.sum(1).topk(3).indices
            gradient = flat_gradient(layer, layer.weight.grad, layer.bias.grad)[0]
            turned = (
                known.gradient_eigenvectors[0][:, rows].T
                @ gradient
                @ known.activation_eigenvectors[0][:, columns]
            )
            chosen = known.lambda_matrix[0][rows][:, columns]
            parts.append((turned / (chosen + level).sqrt()).flatten())
        vectors.append(torch.cat(parts))
    return nn.functional.normalize(torch.stack(vectors).detach(), dim=1)


def test_cosines_are_those_of_explicit_gradients(problem) -> None:
    model, images, factors = problem
    store = build_store(model, factors, images, LEADING)
    directions = StoredDirections.of(store, model, factors)
    rows = explicit(model, factors, images.images(), images.targets())
    other = make_images(5, seed=9)
    asked = explicit(model, factors, other.images(), other.targets())
    vectors = directions.vectors(other.images(), other.targets())
    np.testing.assert_allclose(directions.towards(vectors), asked @ rows.T, atol=4e-3)
    some = np.array([7, 3, 30])
    np.testing.assert_allclose(directions.rows(some), rows[some] @ rows.T, atol=4e-3)
    taken = directions.take(some)
    expected = rows[some] @ rows[some].T
    np.testing.assert_allclose(taken.rows(np.arange(3)), expected, atol=4e-3)
    with pytest.raises(ValueError, match="read-only"):
        store.rows[:] = 0


def test_cosines_in_bfloat16_are_those_of_explicit_gradients(problem, monkeypatch) -> None:
    model, images, _ = problem
    factors = fit(model, images, None, tier="fast")
    rows = explicit(model, factors, images.images(), images.targets())
    cosines = {}
    for bf16, mean, most in ((False, 1e-3, 4e-3), (True, 5e-3, 0.1)):
        monkeypatch.setattr("defense.influence.products.has_bf16", lambda _, bf16=bf16: bf16)
        store = build_store(model, factors, images, LEADING)
        sketcher = store.sketcher(model, factors)
        assert sketcher.network.dtype == (torch.bfloat16 if bf16 else torch.float32)
        cosines[bf16] = StoredDirections(store, sketcher).rows(np.arange(len(images)))
        apart = np.abs(cosines[bf16] - (rows @ rows.T).numpy())
        assert apart.mean() < mean
        assert apart.max() < most
    assert not np.array_equal(cosines[False], cosines[True])


def test_a_store_of_components_is_refused_because_its_vectors_are_shorter(problem) -> None:
    model, images, factors = problem
    store = build_store(model, factors, images, StoreSettings(components=8, probe=16))
    with pytest.raises(ArtifactError, match="build it with components null"):
        StoredDirections.of(store, model, factors)


def test_directions_of_which_most_is_not_kept_are_refused(problem) -> None:
    """The metric takes rows to be of length one."""
    model, images, factors = problem
    all_of_it = DirectionSettings(leading=None, sketch=4).store()
    with pytest.raises(ArtifactError, match=r"set directions\.leading"):
        StoredDirections.of(build_store(model, factors, images, all_of_it), model, factors)


def test_a_direction_that_is_not_finite_is_refused_by_row(problem) -> None:
    model, images, factors = problem
    store = build_store(model, factors, images, LEADING)
    store.self_influence[7] = np.nan
    with pytest.raises(NumericalError, match="got 1 of 40 that are not, the first of row 7"):
        StoredDirections.of(store, model, factors)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_killed_run_continues_with_the_same_bytes(problem, count, tmp_path: Path, monkeypatch):
    model, images, factors = problem
    monkeypatch.setattr("defense.influence.store.GATHER", 1)
    undisturbed = build_store(model, factors, images, LEADING)
    monkeypatch.setattr("defense.checkpoints.CHECKPOINT_SECONDS", 0.0)
    original, seen = Sketcher.sketches, []

    def sketches(self, *data):
        seen.append(1)
        if len(seen) == count:
            raise KilledError
        return original(self, *data)

    monkeypatch.setattr(Sketcher, "sketches", sketches)
    with pytest.raises(KilledError):
        build_store(model, factors, images, LEADING, scratch=tmp_path)
    seen[:] = [1] * count  # no second kill
    changed = LEADING.model_copy(update={"leading": (16, 2)})
    build_store(model, factors, images, changed, scratch=tmp_path)
    assert len(seen) == count + 5  # of other settings: nothing is continued
    seen[:] = [1] * count
    continued = build_store(model, factors, images, LEADING, scratch=tmp_path)
    assert len(seen) == count + 5 - (count - 1)
    for name in ("rows", "self_influence", "kept"):
        np.testing.assert_array_equal(getattr(continued, name), getattr(undisturbed, name))
    assert continued.components is None


def test_saved_directions_answer_the_same_and_refuse_another_model(problem, tmp_path: Path) -> None:
    model, images, factors = problem
    store = build_store(model, factors, images, LEADING)
    store.save(tmp_path / "directions")
    kept = load_store(tmp_path / "directions")
    assert kept.components is None
    np.testing.assert_array_equal(kept.rows, store.rows)
    with pytest.raises(ArtifactError, match="build it again"):
        kept.sketcher(model, fit(model, images, None, tier="fast"))
