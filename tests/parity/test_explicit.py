"""The whole of EK-FAC in float64 against dense matrices, built by autograd and F.unfold."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense.influence import orders, scores
from defense.influence.factors import FactorSettings, fit_factors
from defense.influence.layers import find_layers, flat_gradient
from defense.influence.orders import Frame
from defense.influence.scores import ScoreSettings, compute_influence
from defense.influence.task import CLASSIFICATION
from defense.records import ImageSet, Queries
from tests.conftest import make_images

NUM_CLASSES = 4
DAMPING = 0.1
SETTINGS = ScoreSettings(batch_size=16, damping=DAMPING)


def network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(NUM_CLASSES))
    model(torch.zeros(2, 3, 11, 11))  # sizes the lazy layer
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.double().eval()


NETWORKS = {
    "plain": lambda: network(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(4)),
    "no bias": lambda: network(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(inplace=True)),
    "stride": lambda: network(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Tanh()),
    "dilation": lambda: network(nn.Conv2d(3, 4, 3, dilation=2, padding=2), nn.Tanh()),
    "groups": lambda: network(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3, groups=2)),
    "depthwise": lambda: network(nn.Conv2d(3, 6, 3, groups=3, padding=1), nn.Tanh()),
    "batch norm": lambda: network(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
    ),
}


def set_of(count: int = 40) -> ImageSet:
    return make_images(count, seed=4, shape=(3, 11, 11))


def queries_of(images: ImageSet, count: int = 5) -> Queries:
    labels = torch.arange(count) % NUM_CLASSES
    nothing = torch.zeros(count, dtype=torch.int64)
    return Queries(images.images(np.arange(count)), labels, nothing, nothing)


def one_gradient(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """Differentiate one number with respect to every layer: name to ``[g, o, i]``."""
    result = {}
    for name, layer in find_layers(model).items():
        wanted = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        weight, *bias = torch.autograd.grad(value, wanted, retain_graph=True)
        result[name] = flat_gradient(layer, weight, bias[0] if bias else None)
    return result


def gradients_of(model: nn.Module, function, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Per-sample gradients by one backward pass each: name to ``[n, g, o, i]``."""
    rows = [
        one_gradient(model, function(model(image[None].double()), label[None]).sum())
        for image, label in zip(images, labels, strict=True)
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    """Patches ``[g, n*t, i]`` by F.unfold, inputs ordered by kernel entry and channel."""
    if isinstance(layer, nn.Linear):
        rows = x[None]
    else:
        columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        split = columns.unflatten(1, (layer.groups, layer.weight.shape[1], -1))
        rows = split.permute(1, 0, 4, 3, 2).flatten(3).flatten(1, 2)
    ones = [] if layer.bias is None else [rows.new_ones(*rows.shape[:2], 1)]
    return torch.cat([rows, *ones], dim=2)


def covariances_of(model: nn.Module, images: Tensor, labels: Tensor):
    """Covariances of both sides: name to (``[g, i, i]``, ``[g, o, o]``)."""
    seen: dict[str, list[Tensor]] = {}
    layers = find_layers(model)
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda module, x, y, name=name: seen.__setitem__(name, [x[0], y]) or y.clone()
        )
    loss = F.cross_entropy(model(images.double()), labels, reduction="sum")
    slopes = torch.autograd.grad(loss, [y for _, y in seen.values()])
    result = {}
    for (name, (x, _)), slope in zip(seen.items(), slopes, strict=True):
        layer = layers[name]
        a = unfolded(layer, x.detach())
        s = slope.flatten(2) if slope.ndim == 4 else slope[..., None]
        s = s.unflatten(1, (len(a), -1)).permute(1, 0, 3, 2).flatten(1, 2)
        result[name] = a.transpose(1, 2) @ a, s.transpose(1, 2) @ s
        layer._forward_hooks.clear()
    return result


def sampled_labels(model: nn.Module, images: ImageSet) -> Tensor:
    draws = torch.rand(len(images), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return CLASSIFICATION.sample(model(images.images().double()), draws)


def fit(model: nn.Module, images: ImageSet, **options):
    settings = FactorSettings(tier="exact", **options)
    return fit_factors(model, images, settings, torch.Generator().manual_seed(0))


def kron_basis(layer) -> list[Tensor]:
    pairs = zip(layer.gradient_eigenvectors, layer.activation_eigenvectors, strict=True)
    return [torch.kron(s.contiguous(), a.contiguous()) for s, a in pairs]


@pytest.fixture(params=NETWORKS)
def model(request) -> nn.Module:
    return NETWORKS[request.param]()


def test_bases_diagonalise_the_covariances(model: nn.Module) -> None:
    images = set_of()
    explicit = covariances_of(model, images.images(), sampled_labels(model, images))
    layers = fit(model, images).layers
    assert layers.keys() == explicit.keys()
    for name, layer in layers.items():
        bases = layer.activation_eigenvectors, layer.gradient_eigenvectors
        for basis, matrix in zip(bases, explicit[name], strict=True):
            eye = torch.eye(basis.shape[1], dtype=torch.float64).expand_as(basis)
            torch.testing.assert_close(basis.transpose(1, 2) @ basis, eye, atol=1e-12, rtol=0)
            turned = basis.transpose(1, 2) @ matrix @ basis
            rest = turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))
            assert rest.abs().max() < 1e-11 * turned.abs().max()


def test_lambda_is_the_second_moment_in_the_basis(model: nn.Module) -> None:
    images = set_of()
    labels = sampled_labels(model, images)
    explicit = gradients_of(model, CLASSIFICATION.loss, images.images(), labels)
    for name, layer in fit(model, images).layers.items():
        turned = (
            layer.gradient_eigenvectors.transpose(1, 2)
            @ explicit[name]
            @ layer.activation_eigenvectors
        )
        torch.testing.assert_close(
            layer.lambda_matrix, turned.square().mean(0), rtol=1e-9, atol=1e-18
        )


@pytest.mark.parametrize("tile", [300, orders.TILE])
def test_scores_and_norms_are_those_of_the_dense_inverse(
    model: nn.Module, tile: int, monkeypatch
) -> None:
    monkeypatch.setattr(orders, "TILE", tile)
    images = set_of()
    queries, factors = queries_of(images), fit(model, images)
    rows = gradients_of(model, CLASSIFICATION.measure, images.images(), images.targets())
    wanted = gradients_of(model, CLASSIFICATION.measure, queries.images, queries.labels)
    expected = np.zeros((2, 5, 40))
    own = np.zeros((2, 40))
    for number, damping in enumerate((DAMPING, 1.0)):
        for name, layer in factors.layers.items():
            mean = layer.lambda_matrix.mean()
            for group, basis in enumerate(kron_basis(layer)):
                spectrum = layer.lambda_matrix[group].flatten() + damping * mean
                inverse = basis / spectrum @ basis.T
                q, n = (part[name][:, group].flatten(1) for part in (wanted, rows))
                expected[number] += (q @ inverse @ n.T).numpy()
                own[number] += (n @ inverse * n).sum(1).numpy()
    result = compute_influence(
        model, factors, queries, images, SETTINGS, dampings=(DAMPING, 1.0), self_influence=True
    )
    bound = 1e-9 * np.abs(expected).max()
    np.testing.assert_allclose(result.margin, expected, rtol=1e-8, atol=bound)
    np.testing.assert_allclose(result.self_influence, own, rtol=1e-9)
    relative = expected / np.sqrt(own)[:, None]
    np.testing.assert_allclose(result.relative(), relative, rtol=1e-8, atol=1e-9 * relative.max())
    cosine = relative / np.sqrt(result.query_norm)[:, :, None]
    np.testing.assert_allclose(result.cosine(), cosine, rtol=1e-8, atol=1e-9)
    of_losses = own * result.loss_scale**2
    np.testing.assert_allclose(result.loss_self_influence(), of_losses, rtol=1e-9)
    loss = gradients_of(model, CLASSIFICATION.loss, images.images(), images.targets())
    for name in loss:
        scale = torch.from_numpy(result.loss_scale)[:, None, None, None]
        torch.testing.assert_close(loss[name], -scale * rows[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("tile", [300, orders.TILE])
def test_every_frame_gives_the_same_scores(model: nn.Module, tile: int, monkeypatch) -> None:
    monkeypatch.setattr(orders, "TILE", tile)
    images = set_of()
    queries, factors = queries_of(images), fit(model, images)
    eigenbasis = compute_influence(model, factors, queries, images, SETTINGS, self_influence=True)
    bound = 1e-9 * np.abs(eigenbasis.margin).max()
    for frame in (Frame(a, b) for a in (True, False) for b in (True, False)):
        monkeypatch.setattr(Frame, "of", lambda *_, frame=frame, **__: frame)
        result = compute_influence(model, factors, queries, images, SETTINGS)
        np.testing.assert_allclose(result.margin, eigenbasis.margin, rtol=1e-8, atol=bound)
        np.testing.assert_allclose(result.query_norm, eigenbasis.query_norm, rtol=1e-9)


def test_queries_of_another_size_meet_the_rows_in_their_frame() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 4),
    ).double()  # fmt: skip
    rows, other = (
        make_images(40, seed=1, shape=(3, 4, 4)),
        make_images(60, seed=2, shape=(3, 16, 16)),
    )
    nothing = torch.zeros(60, dtype=torch.int64)
    queries = Queries(other.images(), other.targets(), nothing, nothing)
    factors = fit(model, rows)
    cheapest, eigenbasis = (
        compute_influence(model, factors, queries, rows, SETTINGS, self_influence=norms).margin
        for norms in (False, True)
    )
    np.testing.assert_allclose(cheapest, eigenbasis, rtol=1e-8, atol=1e-9 * np.abs(cheapest).max())


def test_query_norms_are_scores_of_a_query_on_itself() -> None:
    model, images = NETWORKS["plain"](), set_of()
    queries = Queries(images.images(), images.targets(), *[torch.zeros(40, dtype=torch.int64)] * 2)
    result = compute_influence(
        model, fit(model, images), queries, images, SETTINGS, self_influence=True
    )
    np.testing.assert_allclose(result.query_norm, result.self_influence, rtol=1e-9)
    np.testing.assert_allclose(np.diagonal(result.margin[0]), result.query_norm[0], rtol=1e-9)


@pytest.mark.parametrize("order", ["natural", "permuted"])
def test_batches_and_row_order_are_irrelevant(model: nn.Module, order: str) -> None:
    images = set_of()
    rows = np.random.default_rng(0).permutation(40) if order == "permuted" else np.arange(40)
    moved = ImageSet(
        images.pixels, images.labels[rows], images.ids[rows], images.class_names, images.rows[rows]
    )
    queries = queries_of(images)
    first, second = (
        compute_influence(
            model, fit(model, source, fisher="empirical", batch_size=size), queries, source,
            ScoreSettings(batch_size=size, damping=DAMPING), self_influence=True,
        )
        for source, size in ((images, 40), (moved, 7))
    )  # fmt: skip
    bound = 1e-6 * np.abs(first.margin).max()  # eigenvectors of close eigenvalues may differ
    np.testing.assert_allclose(second.margin, first.margin[:, :, rows], rtol=1e-6, atol=bound)
    np.testing.assert_allclose(second.self_influence, first.self_influence[:, rows], rtol=1e-6)


@pytest.mark.parametrize("name", ["plain", "stride", "groups"])
def test_ekfac_is_closer_to_the_exact_fisher_than_kfac(name: str) -> None:
    model, images = NETWORKS[name](), set_of(96)
    labels = sampled_labels(model, images)
    explicit = gradients_of(model, CLASSIFICATION.loss, images.images(), labels)
    covariances = covariances_of(model, images.images(), labels)
    for layer_name, layer in fit(model, images).layers.items():
        for group, basis in enumerate(kron_basis(layer)):
            flat = explicit[layer_name][:, group].flatten(1)
            exact = flat.T @ flat / len(flat)
            ekfac = basis * layer.lambda_matrix[group].flatten() @ basis.T
            a, s = (side[group] for side in covariances[layer_name])
            kfac = torch.kron(s, a)
            kfac *= (kfac * exact).sum() / (kfac * kfac).sum()  # the best scale K-FAC can have
            errors = [float((m - exact).norm() / exact.norm()) for m in (ekfac, kfac)]
            assert errors[0] < errors[1]


def test_equal_queries_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = NETWORKS["plain"](), set_of()
    queries = queries_of(images)
    twice = Queries(*(torch.cat([part, part.flip(0)]) for part in vars(queries).values()))
    counts = []
    original = scores._Scorer.query_side
    monkeypatch.setattr(
        scores._Scorer,
        "query_side",
        lambda self, images, labels: counts.append(len(labels)) or original(self, images, labels),
    )
    factors = fit(model, images)
    single, double = (
        compute_influence(model, factors, asked, images, SETTINGS).margin
        for asked in (queries, twice)
    )
    assert counts == [5, 5]
    np.testing.assert_array_equal(double, np.concatenate([single, single[:, ::-1]], axis=1))


def test_a_subset_of_rows_scores_as_in_the_whole() -> None:
    model, images = NETWORKS["plain"](), set_of()
    mask = np.arange(40) % 3 == 0
    queries, factors = queries_of(images), fit(model, images)
    whole, part = (
        compute_influence(model, factors, queries, rows, SETTINGS).margin
        for rows in (images, images.where(mask))
    )
    np.testing.assert_allclose(part, whole[:, :, mask], rtol=1e-9, atol=1e-12)
