"""Rotated windows of a convolution without the zeros of its padding.

On small maps many pixels that a kernel sees are padding: 44 of 144 for a 3x3 kernel on 4x4 pixels.
Summing one product per kernel offset, over the positions where the offset lies inside, leaves
them out.
"""

from dataclasses import dataclass
from itertools import product as pairs

import torch
from torch import Tensor, nn

from defense.influence.products import Workspace, product

INSIDE = 0.75  # share of the kernel's pixels below which the sum over offsets is faster


@dataclass(frozen=True)
class Reach:
    """Where one kernel offset lies inside the image, along one side.

    Attributes:
        outputs: The positions, in the output.
        inputs: The pixels, in the input.
    """

    outputs: slice
    inputs: slice

    def __len__(self) -> int:
        """Number of positions."""
        return max(0, self.outputs.stop - self.outputs.start)


def reaches(layer: nn.Conv2d, side: int, size: int) -> tuple[int, list[Reach]]:
    """Count the positions along one side of an image, and list every kernel offset's reach."""
    kernel, stride, dilation = layer.kernel_size[side], layer.stride[side], layer.dilation[side]
    before, after = layer._reversed_padding_repeated_twice[2 * (1 - side) :][:2]
    places = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    found = []
    for offset in (dilation * number - before for number in range(kernel)):
        first = max(0, -(offset // stride))
        last = min(places, (size - 1 - offset) // stride + 1)
        start = first * stride + offset
        found.append(
            Reach(slice(first, last), slice(start, start + max(0, last - first) * stride, stride))
        )
    return places, found


def worthwhile(layer: nn.Module, x: Tensor) -> bool:
    """Tell whether the sum over offsets is faster than products of whole windows."""
    if not isinstance(layer, nn.Conv2d) or x.dtype != torch.float32:
        return False
    if layer.groups > 1 or layer.bias is not None or layer.padding_mode != "zeros":
        return False
    share = 1.0
    for side in (0, 1):
        places, found = reaches(layer, side, x.shape[2 + side])
        share *= sum(map(len, found)) / (places * len(found))
    return share < INSIDE


def rotated_windows(
    layer: nn.Conv2d, x: Tensor, offsets: list[Tensor], width: int, space: Workspace
) -> Tensor:
    """Rotate what the kernel sees at every position: ``[n, 1, t, width]``.

    Args:
        layer: A convolution for which this is `worthwhile`.
        x: Its input, ``[n, c, h, w]``.
        offsets: For every kernel offset, row by row, the packed matrix ``[width, c]``.
        width: Number of directions.
        space: Where the result lies; it lasts until the next call.
    """
    (height, down), (breadth, right) = (reaches(layer, s, x.shape[2 + s]) for s in (0, 1))
    pixels = x.permute(2, 3, 0, 1).contiguous()
    size = height, breadth, len(x), width
    total = space.take("windows", size, x.dtype, x.device).zero_()
    for matrix, (rows, columns) in zip(offsets, pairs(down, right), strict=True):
        if not len(rows) or not len(columns):
            continue
        seen = pixels[rows.inputs, columns.inputs].reshape(-1, x.shape[1])
        part = total[rows.outputs, columns.outputs]
        part += product(seen, matrix).view(part.shape)
    return total.permute(2, 0, 1, 3).flatten(1, 2)[:, None]
