"""Per-sample gradients in the eigenbasis, in any order of products.

In the eigenbasis the gradient of sample n is ``(S Qs)^T (A Qa)`` with activations `A`
``[t, i]`` and output gradients `S` ``[t, o]``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense.influence.borders import rotated_windows, worthwhile
from defense.influence.layers import Layer, Trace, activations, output_gradients, padded
from defense.influence.orders import (
    GROUP,
    TILE,
    Frame,
    Gramian,
    Grid,
    Order,
    balanced,
    rotates_late,
)
from defense.influence.products import Workspace, outer_each, packed, product


class Rotation:
    """Rotates the last dimension: ``[n, g, t, k]`` by ``[g, r, k]`` to ``[n, g, t, r]``."""

    def __init__(self, matrices: Tensor, place: torch.device, dtype: torch.dtype) -> None:
        """Describe products with the same matrices; nothing is copied before the first."""
        self.source, self.place, self.dtype = matrices, place, dtype
        self.num_offsets = 1

    @cached_property
    def matrices(self) -> Tensor:
        """The matrices in the layout and precision of the products."""
        placed = self.source.to(self.place, self.dtype)
        return packed(placed[0]) if len(placed) == 1 else placed.transpose(1, 2).contiguous()

    def __call__(self, rows: Tensor) -> Tensor:
        """Rotate."""
        if len(self.source) > 1:
            n, groups, t, k = rows.shape
            flat = rows.transpose(0, 1).reshape(groups, n * t, k) @ self.matrices
            return flat.view(groups, n, t, -1).transpose(0, 1)
        flat = product(rows.reshape(-1, rows.shape[-1]), self.matrices)
        return flat.view(*rows.shape[:-1], -1)

    @cached_property
    def offsets(self) -> list[Tensor]:
        """The matrix of a convolution cut by kernel offset: each ``[r, c]``."""
        placed = self.source[0].to(self.place, self.dtype)
        width = placed.shape[1] // self.num_offsets
        return [packed(part.contiguous()) for part in placed.split(width, dim=1)]

    def windows(self, trace: Trace, space: Workspace) -> Tensor:
        """Rotate what a convolution's kernel sees, where that is `worthwhile`."""
        layer = trace.layer
        assert isinstance(layer, nn.Conv2d)
        self.num_offsets = layer.weight[0, 0].numel()
        return rotated_windows(layer, trace.x, self.offsets, self.source.shape[1], space)

    def convolves(self, layer: Layer) -> bool:
        """Tell whether a convolution with few filters does what the rotation of patches does."""
        narrow = self.source.shape[1] < self.source.shape[2]
        return narrow and isinstance(layer, nn.Conv2d) and layer.groups == 1

    @cached_property
    def filters(self) -> Tensor:
        """The matrix ``[r, k]`` as the filters of a convolution."""
        return self.source[0].to(self.place, self.dtype).contiguous()

    def convolved(self, trace: Trace) -> Tensor:
        """Rotate what a convolution's kernel sees by a convolution: ``[n, 1, t, r]``."""
        layer = trace.layer
        assert isinstance(layer, nn.Conv2d)
        rows, columns = layer.kernel_size
        matrix = self.filters
        inner = rows * columns * layer.in_channels
        weight = matrix[:, :inner].view(-1, rows, columns, layer.in_channels).permute(0, 3, 1, 2)
        bias = matrix[:, inner] if matrix.shape[1] > inner else None
        x = padded(layer, trace.x).to(self.dtype)
        turned = F.conv2d(x, weight, bias, layer.stride, 0, layer.dilation)
        return turned.permute(0, 2, 3, 1).reshape(len(trace), 1, trace.positions, -1)

    def outputs(self, gradient: Tensor) -> Tensor:
        """Rotate the outputs of gradients: ``[n, g, o, i]`` to ``[n, g, r, i]``."""
        return self(gradient.transpose(2, 3)).transpose(2, 3)


@dataclass(frozen=True)
class Basis:
    """Rotations of a layer's inputs and outputs, in the precision of the heavy products."""

    inputs: Rotation
    outputs: Rotation

    @classmethod
    def of(
        cls,
        activation: Tensor,
        gradient: Tensor,
        place: torch.device,
        dtype: torch.dtype,
        *,
        back: bool = False,
    ) -> "Basis":
        """Prepare the rotations into the eigenbasis, or back.

        Args:
            activation: Eigenvectors in columns, ``[g, i, i]``.
            gradient: Eigenvectors in columns, ``[g, o, o]``.
            place: The device.
            dtype: Precision of the products.
            back: From the eigenbasis instead of into it.
        """
        sides = (side if back else side.transpose(1, 2) for side in (activation, gradient))
        return cls(*(Rotation(side, place, dtype) for side in sides))


def gradients(
    trace: Trace,
    basis: Basis,
    order: Order,
    dtype: torch.dtype,
    space: Workspace,
    tile: int = TILE,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield per-sample gradients ``[m, g, o, i]`` of few samples at a time.

    Args:
        trace: What the layer saw.
        basis: Where to rotate them.
        order: When to rotate.
        dtype: Precision of the products, and of the result.
        space: Holds the result until the next one is asked for.
        tile: Elements of the result; few stay in the cache, many make large products.
    """
    shape = trace.shape
    for group, a, s in _sides(trace, basis, order, dtype, space):
        for part in balanced(len(a), tile // (shape.groups * s.shape[-1] * a.shape[-1])):
            gradient = _gradient(a[part], s[part], space)
            if not order.inputs_first:
                gradient = basis.inputs(gradient)
            if not order.outputs_first:
                gradient = basis.outputs.outputs(gradient)
            yield slice(group.start + part.start, group.start + part.stop), gradient


def tiles(
    trace: Trace, basis: Basis, frame: Frame, grid: Grid, dtype: torch.dtype, space: Workspace
) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield per-sample gradients ``[m, g, outputs, inputs]`` of many samples, tile by tile.

    Args:
        trace: What the layer saw.
        basis: Rotations of the sides the frame names.
        frame: Which sides to rotate.
        grid: How they are cut; made for the shape of this trace.
        dtype: Precision of the products, and of the result.
        space: Holds the result until the next one is asked for.

    Yields:
        The samples, the number of the tile, and the tile.
    """
    shape, late = trace.shape, rotates_late(trace.shape, frame)
    order = Order(inputs_first=frame.inputs and not late, outputs_first=frame.outputs)
    sides, cells = _sides(trace, basis, order, dtype, space), grid.cells(shape)
    if len(cells) == 1:  # the batch fits into one tile
        parts = _whole(trace, sides, dtype, space)
    else:
        parts = (
            (group, number, _gradient(a[..., inputs], s[..., outputs], space))
            for group, a, s in sides
            for number, (outputs, inputs) in enumerate(cells)
        )
    for group, number, gradient in parts:
        yield group, number, basis.inputs(gradient) if late else gradient


def _whole(
    trace: Trace,
    sides: Iterator[tuple[slice, Tensor, Tensor]],
    dtype: torch.dtype,
    space: Workspace,
) -> Iterator[tuple[slice, int, Tensor]]:
    shape = trace.shape
    size = len(trace), shape.groups, shape.outputs, shape.inputs
    whole = space.take("tile", size, dtype, trace.x.device)
    for group, a, s in sides:
        _contract(a, s, whole[group])
    yield slice(0, len(trace)), 0, whole


def _sides(
    trace: Trace, basis: Basis, order: Order, dtype: torch.dtype, space: Workspace
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield activations and output gradients, rotated where the order says so."""
    shape = trace.shape
    for group in balanced(len(trace), GROUP // (shape.groups * shape.positions * shape.inputs)):
        part = trace.rows(group)
        if order.inputs_first and basis.inputs.convolves(part.layer):
            a = basis.inputs.convolved(part)
        elif order.inputs_first and dtype == part.x.dtype and worthwhile(part.layer, part.x):
            a = basis.inputs.windows(part, space)
        else:
            a = activations(part, dtype, space)
            a = basis.inputs(a) if order.inputs_first else a
        s = output_gradients(part, dtype)
        if order.outputs_first:
            s = basis.outputs(s)
        yield group, a, s


def _gradient(a: Tensor, s: Tensor, space: Workspace) -> Tensor:
    """Sum over positions: ``[n, g, t, i]`` and ``[n, g, t, o]`` to ``[n, g, o, i]``."""
    size = *a.shape[:2], s.shape[-1], a.shape[-1]
    return _contract(a, s, space.take("gradient", size, a.dtype, a.device))


def _contract(a: Tensor, s: Tensor, out: Tensor) -> Tensor:
    outer_each(s.flatten(0, 1), a.flatten(0, 1), out.flatten(0, 1))
    return out


def add_squares(
    total: Tensor,
    trace: Trace,
    basis: Basis,
    order: Order | Gramian,
    dtype: torch.dtype,
    space: Workspace,
) -> None:
    """Add the squared gradients of a batch to `total` ``[g, o, i]``."""
    if isinstance(order, Gramian):
        _add_pairs(total, trace, basis, dtype, space)
        return
    for _, gradient in gradients(trace, basis, order, dtype, space):
        wide = gradient.to(total.dtype)
        if len(wide) == 1:
            total.addcmul_(wide[0], wide[0])
        else:
            total.add_(wide.square_().sum(0))


def _add_pairs(
    total: Tensor, trace: Trace, basis: Basis, dtype: torch.dtype, space: Workspace
) -> None:
    first, second = torch.triu_indices(*[trace.shape.positions] * 2, device=total.device)
    weight = torch.where(first == second, 1.0, 2.0).to(total.dtype)[:, None]
    both = Order(inputs_first=True, outputs_first=True)
    for _, a, s in _sides(trace, basis, both, dtype, space):
        a, s = a.to(total.dtype), s.to(total.dtype)
        left = (s[:, :, first] * s[:, :, second] * weight).transpose(0, 1).flatten(1, 2)
        right = (a[:, :, first] * a[:, :, second]).transpose(0, 1).flatten(1, 2)
        total.add_((left.transpose(1, 2) @ right).clamp_min_(0))  # squares, but for rounding
