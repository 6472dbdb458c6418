"""Per-sample gradients and parameters in the layout of the factors, the plain way."""

import torch
from torch import Tensor, nn

from defense.influence.layers import Layer, Trace, activations, output_gradients
from defense.influence.products import Workspace


def per_sample_gradient(trace: Trace) -> Tensor:
    """Contract activations and output gradients over positions: ``[n, g, o, i]``."""
    dtype = trace.x.dtype
    a, s = activations(trace, dtype, Workspace()), output_gradients(trace, dtype)
    return s.transpose(2, 3) @ a


def flat_gradient(layer: Layer, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Bring a layer's parameters, or their gradients, to ``[g, o, i]`` as above."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    if isinstance(layer, nn.Conv2d):
        weight = weight.permute(0, 2, 3, 1)
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    if bias is None:
        return matrix
    return torch.cat([matrix, bias.reshape(groups, -1, 1)], dim=2)
