"""Per-sample gradients of linear and convolution layers, from inputs and output gradients.

Every supported layer is brought to one form. With `g` groups, `t` positions (pixels or tokens)
that share the weights, `i` inputs (counting the bias) and `o` outputs per group, the gradient
of sample n is ``sum_t s[n, g, t, :] a[n, g, t, :]^T`` in ``[g, o, i]``, where `a` are the
layer's inputs and `s` the gradients of its outputs (Grosse & Martens 2016, section 3).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense.errors import UnsupportedLayerError

Layer = nn.Linear | nn.Conv2d
Pair = tuple[Tensor, Tensor]


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """List the layers EK-FAC treats, by name.

    Raises:
        UnsupportedLayerError: There is none, or two of them share a weight.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Layer)}
    if not layers:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise UnsupportedLayerError(
            f"expected a model with at least one Linear or Conv2d layer, got {', '.join(kinds)}"
        )
    uses = Counter(id(layer.weight) for layer in layers.values())
    tied = [name for name, layer in layers.items() if uses[id(layer.weight)] > 1]
    if tied:
        raise UnsupportedLayerError(
            f"the layers {', '.join(tied)} share one weight, whose gradient is not the sum of "
            "one layer's outer products; give each its own weight"
        )
    return layers


def coverage(model: nn.Module, layers: dict[str, Layer]) -> float:
    """Return the share of the model's parameters that the layers hold."""
    inside = sum(p.numel() for layer in layers.values() for p in layer.parameters(recurse=False))
    return inside / sum(p.numel() for p in model.parameters())


def activations(layer: Layer, x: Tensor) -> Tensor:
    """Bring a layer's input to ``[n, g, t, i]``, with a last column of ones for a bias."""
    if isinstance(layer, nn.Conv2d):
        rows = _patches(layer, x)
    else:
        rows = x.reshape(x.shape[0], 1, -1, x.shape[-1])
    return rows if layer.bias is None else F.pad(rows, (0, 1), value=1.0)


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    return columns.unflatten(1, (layer.groups, -1)).transpose(2, 3)


def output_gradients(layer: Layer, grad: Tensor) -> Tensor:
    """Bring the gradient of a layer's output to ``[n, g, t, o]``."""
    if isinstance(layer, nn.Conv2d):
        return grad.flatten(2).unflatten(1, (layer.groups, -1)).transpose(2, 3)
    return grad.reshape(grad.shape[0], 1, -1, grad.shape[-1])


def per_sample_gradient(a: Tensor, s: Tensor) -> Tensor:
    """Contract activations and output gradients over positions: ``[n, g, o, i]``."""
    return s.transpose(2, 3) @ a


def flat_gradient(layer: Layer, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Bring a layer's parameters, or their gradients, to ``[g, o, i]`` as above."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    if bias is None:
        return matrix
    return torch.cat([matrix, bias.reshape(groups, -1, 1)], dim=2)


class Tape:
    """Inputs and outputs of the layers during the latest forward pass."""

    def __init__(self, layers: dict[str, Layer]) -> None:
        """Watch `layers`; use `record` to attach it."""
        self.layers = layers
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def keep(self, name: str, x: Tensor, output: Tensor) -> Tensor:
        """Note one call of a layer; returns the output for the layers after it."""
        if name in self.inputs:
            raise UnsupportedLayerError(
                f"layer {name} runs more than once per forward pass; "
                "per-sample gradients of recurrent layers are not supported"
            )
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        self.inputs[name], self.outputs[name] = x.detach(), output
        return output.clone()  # an in-place activation after the layer must not touch ours

    def forget(self) -> None:
        """Drop the latest forward pass."""
        self.inputs, self.outputs = {}, {}

    def pairs(self, total: Tensor, num_samples: int) -> Iterator[tuple[str, Pair]]:
        """Yield activations and output gradients of every layer that ran, and forget them.

        Args:
            total: Sum over samples of the value to differentiate; sample n must depend on
                input n alone, which holds in eval mode.
            num_samples: Samples of the batch.

        Raises:
            UnsupportedLayerError: A layer's input does not have one entry per sample in front.
        """
        outputs = list(self.outputs.values())
        grads = torch.autograd.grad(total, outputs, allow_unused=True)
        inputs = self.inputs
        self.forget()
        for (name, x), output, grad in zip(inputs.items(), outputs, grads, strict=True):
            layer = self.layers[name]
            if len(x) != num_samples:
                raise UnsupportedLayerError(
                    f"layer {name} gets an input {list(x.shape)} for {num_samples} samples, "
                    "expected the samples in front: keep tokens in a dimension of their own"
                )
            grad = torch.zeros_like(output) if grad is None else grad
            yield name, (activations(layer, x), output_gradients(layer, grad))


@contextmanager
def record(layers: dict[str, Layer]) -> Iterator[Tape]:
    """Attach a tape to layers; the model's parameters should be frozen meanwhile."""
    tape = Tape(layers)

    def hook_for(name: str):  # type: ignore[no-untyped-def]
        return lambda module, inputs, output: tape.keep(name, inputs[0], output)

    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()
