"""EK-FAC factors (George et al. 2018, section 3; Grosse et al. 2023, section 2.2)."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from defense.compute import batches, progress
from defense.errors import NumericalError
from defense.influence.layers import (
    Pair,
    Tape,
    coverage,
    find_layers,
    per_sample_gradient,
    record,
)
from defense.influence.task import CLASSIFICATION, Task
from defense.method import Method
from defense.records import Factors, ImageSet, LayerFactors
from defense.training import frozen


class FactorSettings(Method):
    """How the curvature is estimated.

    Attributes:
        batch_size: Rows per step; bounds the memory, does not change the result.
        fisher: ``sampled`` draws labels from the model (the true Fisher, equal to the
            Gauss-Newton matrix of cross-entropy); ``empirical`` uses the training labels.
    """

    batch_size: int = Field(64, gt=0)
    fisher: Literal["sampled", "empirical"] = "sampled"


def fit_factors(
    model: nn.Module,
    images: ImageSet,
    settings: FactorSettings,
    generator: torch.Generator,
    task: Task = CLASSIFICATION,
) -> Factors:
    """Fit the factors of every linear and convolution layer in two passes over the data.

    The first pass sums the covariances of activations and of output gradients, whose
    eigenvectors span the Kronecker basis; the second takes the mean squared per-sample
    gradient in that basis, the eigenvalue correction.

    Args:
        model: The suspect model; it stays as it is.
        images: The training set.
        settings: How to estimate.
        generator: Draws one label per row, the same for both passes.
        task: Loss and label distribution of the model.

    Returns:
        Factors on the CPU, float32.

    Raises:
        UnsupportedLayerError: The model has no layer to treat, or one runs twice.
        NumericalError: A layer's covariance is not finite, cannot be decomposed, or its
            Lambda is zero or not finite.
    """
    layers = find_layers(model)
    draws = torch.rand(len(images), generator=generator)
    source = _Source(images, settings, draws, task)
    with frozen(model), record(layers) as tape:
        covariances = _covariances(model, tape, source)
        steps = progress(iterable=covariances.items(), desc="eigendecompositions", unit="layer")
        bases = {name: _basis(name, *pair) for name, pair in steps}
        lambdas = _lambdas(model, tape, source, bases)
    ran = {name: layers[name] for name in bases}
    fitted = {
        name: LayerFactors(*(part.cpu() for part in (*bases[name], lambdas[name])))
        for name in bases
    }
    return Factors(fitted, len(images), coverage(model, ran))


class _Source:
    """Batches of the training set with the labels the Fisher matrix is taken over."""

    def __init__(
        self, images: ImageSet, settings: FactorSettings, draws: Tensor, task: Task
    ) -> None:
        self.images, self.settings, self.draws, self.task = images, settings, draws, task

    def pairs(self, model: nn.Module, tape: Tape, label: str) -> Iterator[tuple[str, Pair]]:
        """Yield activations and loss gradients of every layer for batch after batch."""
        place = next(model.parameters()).device
        for rows in batches(len(self.images), self.settings.batch_size, label=label):
            outputs = model(self.images.images(rows).to(place)).float()
            if self.settings.fisher == "empirical":
                targets = self.images.targets(rows).to(place)
            else:
                targets = self.task.sample(outputs.detach(), self.draws[rows].to(place))
            loss = self.task.loss(outputs, targets).sum()
            yield from tape.pairs(loss, len(rows))


def _covariances(model: nn.Module, tape: Tape, source: _Source) -> dict[str, Pair]:
    """Sum the uncentred covariances: name to (``[g, i, i]``, ``[g, o, o]``)."""
    sums: dict[str, Pair] = {}
    for name, pair in source.pairs(model, tape, "covariances"):
        new = tuple(_gram(part) for part in pair)
        old = sums.get(name)
        sums[name] = (new[0], new[1]) if old is None else (old[0] + new[0], old[1] + new[1])
    return sums


def _gram(rows: Tensor) -> Tensor:
    """Sum outer products over samples and positions: ``[n, g, t, d]`` to ``[g, d, d]``."""
    flat = rows.transpose(0, 1).flatten(1, 2)
    return flat.transpose(1, 2) @ flat


def _basis(name: str, activation: Tensor, gradient: Tensor) -> Pair:
    """Eigenvectors of both covariances of a layer, in columns."""
    return _eigenvectors(name, "activation", activation), _eigenvectors(name, "gradient", gradient)


def _eigenvectors(name: str, side: str, matrix: Tensor) -> Tensor:
    wide = matrix.double()
    symmetric = (wide + wide.transpose(1, 2)) / 2
    if not symmetric.isfinite().all():
        raise NumericalError(
            f"the {side} covariance of layer {name} is not finite; "
            "the model's weights or activations overflow: train it again"
        )
    try:
        return torch.linalg.eigh(symmetric).eigenvectors.float()
    except torch.linalg.LinAlgError as error:
        raise NumericalError(
            f"the eigendecomposition of the {side} covariance of layer {name} failed ({error}); "
            "fit the factors on more rows"
        ) from error


def rotate(gradient: Tensor, activation_basis: Tensor, gradient_basis: Tensor) -> Tensor:
    """Bring gradients ``[n, g, o, i]`` into the Kronecker eigenbasis."""
    return gradient_basis.transpose(1, 2) @ gradient @ activation_basis


def rotated_gradient(pair: Pair, basis: Pair) -> Tensor:
    """Per-sample gradients in the eigenbasis, ``[n, g, o, i]``, by the cheaper order."""
    a, s = pair
    if a.shape[2] < min(a.shape[3], s.shape[3]):
        return per_sample_gradient(a @ basis[0], s @ basis[1])
    return rotate(per_sample_gradient(a, s), *basis)


def _lambdas(
    model: nn.Module, tape: Tape, source: _Source, bases: dict[str, Pair]
) -> dict[str, Tensor]:
    """Mean squared per-sample gradient in the eigenbasis, ``[g, o, i]``, by layer."""
    sums: dict[str, Tensor] = {}
    for name, pair in source.pairs(model, tape, "lambda"):
        new = rotated_gradient(pair, bases[name]).square().sum(0)
        sums[name] = sums[name] + new if name in sums else new
    for name, total in sums.items():
        if not 0 < float(total.sum()) < math.inf:
            raise NumericalError(
                f"expected a positive, finite Lambda for layer {name}, got a sum of "
                f"{float(total.sum())}; the layer is dead or the model is saturated: train it again"
            )
    return {name: total / len(source.images) for name, total in sums.items()}


def precondition(gradient: Tensor, factors: LayerFactors, damping: float) -> Tensor:
    """Multiply gradients by the inverse damped EK-FAC matrix.

    Args:
        gradient: ``[q, g, o, i]``.
        factors: Factors of the layer.
        damping: Relative to the mean of the layer's Lambda (Grosse et al. 2023 use 0.1).
    """
    eigenvalues = factors.lambda_matrix
    basis = factors.activation_eigenvectors, factors.gradient_eigenvectors
    scaled = rotate(gradient, *basis) / (eigenvalues + damping * eigenvalues.mean())
    return basis[1] @ scaled @ basis[0].transpose(1, 2)
