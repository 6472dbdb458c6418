"""Whether the gradients of a model's layers are what training sees."""

import numpy as np
import torch
from torch import Tensor

from defense.errors import UnsupportedLayerError
from defense.influence.layers import (
    Layer,
    Trace,
    activations,
    flat_gradient,
    listed,
    output_gradients,
)
from defense.influence.network import Network
from defense.influence.products import Workspace
from defense.records import ImageSet

ROWS = 4  # rows that are differentiated
AGREEMENT = 1e-3  # norm of the difference, relative to the larger norm


def require_faithful(network: Network, images: ImageSet) -> None:
    """Compare sums of per-sample gradients with the gradients of the parameters, on a few rows.

    Factors and scores rest on a layer's gradient being the outer product of its input and its
    output gradient. A layer without a part in the outputs has no gradient, which agrees.

    Raises:
        UnsupportedLayerError: An output depends on other samples or on chance, or the gradients
            differ: a parameter is used elsewhere, too, or something
            changes what goes into the layer's product or comes out of it.
    """
    rows, layers, traces = np.arange(min(ROWS, len(images))), network.layers, dict[str, Trace]()
    parameters = [part for layer in layers.values() for part in layer.parameters(recurse=False)]
    with torch.no_grad():
        alone = network.outputs(images.images(rows[: ROWS // 2]))
    for part in parameters:
        part.requires_grad = True
    outputs, _ = network.rows(images, rows)
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(outputs.shape, generator=generator).to(outputs)
    gradients = network.backward(outputs, slopes, traces.__setitem__, parameters)
    found = {
        id(part): torch.zeros_like(part) if gradient is None else gradient
        for part, gradient in zip(parameters, gradients, strict=True)
    }
    for part in parameters:
        part.requires_grad = False
    if _differ(alone, outputs[: ROWS // 2].detach()):
        raise UnsupportedLayerError(
            "an output of the model depends on the other samples of its batch, or on chance, in "
            "eval mode (batch statistics, dropout that is not told about it), so that a sample "
            "has no gradient of its own"
        )
    differing = [
        name
        for name, layer in layers.items()
        if not _agrees(
            layer,
            found[id(layer.weight)],
            None if layer.bias is None else found[id(layer.bias)],
            traces.get(name),
        )
    ]
    if differing:
        raise UnsupportedLayerError(
            "expected gradients that are the products of a layer's inputs and output gradients; "
            f"they are not in {len(differing)} layers: parameters are used elsewhere, too, or a "
            "hook or an overridden method changes what goes in or comes out; give the layers "
            f"parameters of their own, or add them to factors.exclude: {listed(differing)}"
        )


def _agrees(layer: Layer, weight: Tensor, bias: Tensor | None, trace: Trace | None) -> bool:
    """Compare the gradients of a layer's parameters with what its trace says they are."""
    actual = flat_gradient(layer, weight, bias)
    expected = torch.zeros_like(actual)
    if trace is not None:
        a = activations(trace, actual.dtype, Workspace())
        expected = (output_gradients(trace, actual.dtype).transpose(2, 3) @ a).sum(0)
    return not _differ(actual, expected)


def _differ(one: Tensor, other: Tensor) -> bool:
    largest = max(float(one.norm()), float(other.norm()))
    return float((one - other).norm()) > AGREEMENT * largest
