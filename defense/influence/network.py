"""A frozen copy of a model whose layers can be traced."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from defense.compute import device, repeatable
from defense.influence.layers import Tape, Visit, find_layers
from defense.records import ImageSet


class Affine(nn.Module):
    """A batch normalisation in eval mode: ``x * scale + shift`` per channel.

    Same values, but the backward pass needs no copy of the input.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        """Take over the statistics and parameters of a normalisation."""
        super().__init__()
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        scale = (variance + norm.eps).rsqrt()
        shift = -mean * scale
        if norm.affine:
            scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
        self.register_buffer("scale", scale.detach()[:, None, None])
        self.register_buffer("shift", shift.detach()[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, c, h, w]`` to the same shape."""
        return torch.addcmul(self.shift, x, self.scale)


def _replace_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        hooked = child._forward_hooks or child._forward_pre_hooks
        if type(child) is nn.BatchNorm2d and child.running_mean is not None and not hooked:
            setattr(module, name, Affine(child))
        else:
            _replace_norms(child)


class Network:
    """A copy on the device, in eval mode, without parameter gradients; the model stays as it is.

    Attributes:
        layers: The layers that are traced, by name.
        place: The device.
        dtype: Of the weights: float32, float64 for checks, or bfloat16.
    """

    def __init__(
        self, model: nn.Module, exclude: Sequence[str] = (), dtype: torch.dtype | None = None
    ) -> None:
        """Copy a model.

        Args:
            model: The suspect model.
            exclude: Names of layers to leave out.
            dtype: Of the copy; None for that of the model, but at least float32.

        Raises:
            UnsupportedLayerError: See `find_layers`.
        """
        find_layers(model, exclude)  # before it is copied, which some layers refuse less kindly
        self.place = device()
        self.model = copy.deepcopy(model).to(self.place).to(memory_format=torch.channels_last)
        if all(p.dtype != torch.float64 for p in self.model.parameters()):
            self.model.float()
        self.model.eval().requires_grad_(False)
        _replace_norms(self.model)
        self.model.to(dtype)
        self.layers = find_layers(self.model, exclude)
        self.dtype = next(iter(self.layers.values())).weight.dtype
        self.tape = Tape(self.layers)
        for name, layer in self.layers.items():
            layer.register_forward_hook(self.tape.hook(name), with_kwargs=True, prepend=True)

    def outputs(self, images: Tensor) -> Tensor:
        """Run a batch of images: outputs ``[n, k]`` in at least float32."""
        self.tape.start(len(images))
        layout = torch.channels_last if images.ndim == 4 else torch.preserve_format
        x = images.to(self.place, self.dtype, memory_format=layout)
        with repeatable():
            result: Tensor = self.model(x)
        return result.to(torch.promote_types(self.dtype, torch.float32))

    def rows(self, images: ImageSet, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Run some rows of a set: their outputs and their labels."""
        return self.outputs(images.images(rows)), images.targets(rows).to(self.place)

    def forward(self, visit: Visit) -> None:
        """See `Tape.forward`."""
        with repeatable():
            self.tape.forward(visit)

    def backward(
        self, outputs: Tensor, cotangents: Tensor, visit: Visit, wanted: Sequence[Tensor] = ()
    ) -> Sequence[Tensor | None]:
        """See `Tape.backward`."""
        with repeatable():
            return self.tape.backward(outputs, cotangents, visit, wanted)
