"""Uncentred covariances of activations and output gradients, summed batch by batch.

For a convolution the usual way copies every pixel once per kernel offset and multiplies the
copies. Where the stride is 1 the same matrix follows from the autocorrelation of the input:
its block for two kernel offsets depends on their difference alone, except for strips along
the border of the image that one of them does not see. A 3x3 kernel needs 13 products of
``[c, c]`` and 16 thin ones instead of 81, and no copies; the 13, and two more, are the weight
gradient of a convolution of the input with itself.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense.influence.layers import Layer, Trace, activations, output_gradients
from defense.influence.orders import GROUP, balanced
from defense.influence.products import WIDE, Workspace, outer

PANEL = 512  # columns of a panel of a symmetric product

Span = tuple[int, int]


class Covariance(ABC):
    """A sum of outer products over samples and positions, which grows by batches.

    Attributes:
        parts: What has been summed, enough to continue.
        size: Height and width of the input if it is shifted, else None.
    """

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        """Start at zero."""
        self.parts: dict[str, Tensor] = {}
        self.size = size

    @abstractmethod
    def add(self, trace: Trace, dtype: torch.dtype, space: Workspace) -> None:
        """Add a batch, multiplying in `dtype`."""

    @abstractmethod
    def total(self) -> Tensor:
        """Return the sum, float32 ``[g, d, d]``."""

    def accumulate(self, name: str, value: Tensor) -> None:
        """Add to one of the parts, in at least float32."""
        wide = value if value.dtype == torch.float64 else value.float()
        known = self.parts.get(name)
        self.parts[name] = wide.clone() if known is None else known.add_(wide)


class Gram(Covariance):
    """The product of all rows with themselves, each pair of panels once."""

    def __init__(self, side: str) -> None:
        """Sum over a side: ``activation`` or ``gradient``."""
        super().__init__()
        self.side = side

    def add(self, trace: Trace, dtype: torch.dtype, space: Workspace) -> None:
        """See `Covariance.add`."""
        shape = trace.shape
        size = shape.groups * shape.positions * max(shape.inputs, shape.outputs)
        for part in balanced(len(trace), GROUP // size):
            self._add(trace.rows(part), dtype, space)

    def _add(self, trace: Trace, dtype: torch.dtype, space: Workspace) -> None:
        if self.side == "gradient":
            rows = output_gradients(trace, dtype)
        else:
            rows = activations(trace, dtype, space)
        flat = rows.transpose(0, 1).flatten(1, 2)
        for start in range(0, flat.shape[2], PANEL):
            pairs = zip(flat[:, :, start : start + PANEL], flat[:, :, start:], strict=True)
            self.accumulate(f"{start}", torch.stack([outer(*pair) for pair in pairs]))

    def total(self) -> Tensor:
        """See `Covariance.total`."""
        first = self.parts["0"]
        result = first.new_zeros(first.shape[0], first.shape[2], first.shape[2])
        for name, part in self.parts.items():
            start = int(name)
            result[:, start : start + part.shape[1], start:] = part
        return result.triu() + result.triu(1).transpose(1, 2)


class Autocorrelation(Covariance):
    """Activation covariance of a convolution with stride 1 and zero padding."""

    def __init__(self, layer: nn.Conv2d, height: int, width: int) -> None:
        """Prepare for inputs of one size."""
        super().__init__((height, width))
        self.layer, self.height, self.width = layer, height, width

    def add(self, trace: Trace, dtype: torch.dtype, space: Workspace) -> None:
        """See `Covariance.add`."""
        x = trace.x.to(dtype, memory_format=torch.channels_last)
        many = dtype == torch.bfloat16 and x.shape[1] >= WIDE
        shifts = self._by_products(x, space) if many else self._by_convolution(x)
        self.accumulate("shifts", shifts)
        for name, (shift, rows, columns) in self.strips().items():
            self.accumulate(name, _correlate(x, shift, rows, columns))
        if self.layer.bias is not None:
            wide = torch.promote_types(dtype, torch.float32)
            self.accumulate("sums", x.sum(0, dtype=wide).permute(1, 2, 0))
            self.accumulate("count", x.new_tensor([len(x) * trace.positions], dtype=wide))

    def _by_convolution(self, x: Tensor) -> Tensor:
        """Sum ``x[q] x[q + shift]^T`` over all pixels, for every shift down and to both sides.

        Returns:
            ``[c, c, kernel rows, 2 * kernel columns - 1]``.
        """
        (rows, columns), (down, right) = self.layer.kernel_size, self.layer.dilation
        below = F.pad(x, (0, 0, 0, down * (rows - 1)))
        # As torch.nn.grad.conv2d_weight, but with a result that lies as the kernel writes it.
        size = x.shape[1], x.shape[1], rows, 2 * columns - 1
        _, shifts, _ = torch.ops.aten.convolution_backward(
            x,
            below.contiguous(memory_format=torch.channels_last),
            torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last),
            None, [1, 1], [0, right * (columns - 1)], [down, right], False, [0, 0], 1,
            [False, True, False],
        )  # fmt: skip
        return cast(Tensor, shifts)

    def _by_products(self, x: Tensor, space: Workspace) -> Tensor:
        """Do the same, faster for wide layers in bfloat16, by one product for every shift.

        The input is laid out as ``[h, w + gap, n, c]``; with zeros in the gaps, a shift of the
        whole is one of the pixels that mixes no two rows.
        """
        (rows, columns), (down, right) = self.layer.kernel_size, self.layer.dilation
        n, channels, height, width = x.shape
        pitch = width + right * (columns - 1)
        plane = space.take("plane", (height, pitch, n, channels), x.dtype, x.device)
        plane[:, :width].copy_(x.permute(2, 3, 0, 1))
        plane[:, width:] = 0
        flat = plane.view(-1, channels)
        result = x.new_zeros(rows, 2 * columns - 1, channels, channels)
        for r, c in itertools.product(range(rows), range(1 - columns, columns)):
            step = (r * down * pitch + c * right) * n
            if 0 <= step < len(flat):
                torch.mm(flat[: len(flat) - step].T, flat[step:], out=result[r, c + columns - 1])
        return result.permute(2, 3, 0, 1)

    def _offsets(self) -> list[tuple[int, int]]:
        """Place of every kernel entry relative to an output pixel, in input pixels."""
        left, _, top, _ = self.layer._reversed_padding_repeated_twice
        down, right = self.layer.dilation
        rows, columns = self.layer.kernel_size
        return [(down * r - top, right * c - left) for r in range(rows) for c in range(columns)]

    def _outputs(self) -> tuple[int, int]:
        """Height and width of the output."""
        left, right, top, bottom = self.layer._reversed_padding_repeated_twice
        reach = [
            d * (k - 1) for d, k in zip(self.layer.dilation, self.layer.kernel_size, strict=True)
        ]
        return self.height + top + bottom - reach[0], self.width + left + right - reach[1]

    def _pairs(self) -> Iterator[tuple[int, int, Span]]:
        """Yield every pair of kernel entries and the shift from one to the other."""
        offsets = self._offsets()
        for first, (row, column) in enumerate(offsets):
            for second in range(first, len(offsets)):
                yield first, second, (offsets[second][0] - row, offsets[second][1] - column)

    def _unseen(self, entry: int, shift: Span) -> Iterator[tuple[int, Span, Span]]:
        """Write the part of the image a pair does not see as signed rectangles."""
        sides = [
            _split(size, offset, step, count)
            for size, offset, step, count in zip(
                (self.height, self.width), self._offsets()[entry], shift, self._outputs(),
                strict=True,
            )
        ]  # fmt: skip
        (all_rows, missing_rows), (all_columns, missing_columns) = sides
        if all_rows[0] < all_rows[1] and all_columns[0] < all_columns[1]:
            yield from ((-1, rows, all_columns) for rows in missing_rows)
            yield from ((-1, all_rows, columns) for columns in missing_columns)
            yield from ((1, rows, columns) for rows in missing_rows for columns in missing_columns)

    def strips(self) -> dict[str, tuple[Span, Span, Span]]:
        """Shift, rows and columns of every rectangle that some pair does not see, once."""
        strips = {}
        for first, _, shift in self._pairs():
            for _, rows, columns in self._unseen(first, shift):
                strips[_name(shift, rows, columns)] = shift, rows, columns
        return strips

    def total(self) -> Tensor:
        """See `Covariance.total`."""
        entries, channels = len(self._offsets()), self.layer.in_channels
        shifts = self.parts["shifts"]
        blocks = shifts.new_zeros(entries, channels, entries, channels)
        (down, right), middle = self.layer.dilation, self.layer.kernel_size[1] - 1
        for first, second, shift in self._pairs():
            block = shifts[:, :, shift[0] // down, shift[1] // right + middle].clone()
            for sign, rows, columns in self._unseen(first, shift):
                block += sign * self.parts[_name(shift, rows, columns)]
            blocks[second, :, first, :] = block.T
            blocks[first, :, second, :] = block
        matrix = blocks.view(entries * channels, -1)
        return (matrix if self.layer.bias is None else self._border(matrix))[None]

    def _border(self, matrix: Tensor) -> Tensor:
        """Append the bias: sums over what every kernel entry sees, and the count."""
        (height, width), sums = self._outputs(), self.parts["sums"]
        seen = [
            sums[max(r, 0) : max(r + height, 0), max(c, 0) : max(c + width, 0)].sum((0, 1))
            for r, c in self._offsets()
        ]
        column = torch.cat([*seen, self.parts["count"]])
        return torch.cat([torch.cat([matrix, column[None, :-1]]), column[:, None]], dim=1)


def _name(shift: Span, rows: Span, columns: Span) -> str:
    return ",".join(map(str, (*shift, *rows, *columns)))


def _split(size: int, offset: int, shift: int, outputs: int) -> tuple[Span, list[Span]]:
    """Find where a pixel and its shifted partner lie inside, and what of that is not seen.

    Args:
        size: Pixels of the input along one side.
        offset: First pixel the kernel entry sees.
        shift: From the pixel to its partner.
        outputs: Number of pixels the kernel entry sees.

    Returns:
        The span inside the image, and the spans of it that the kernel entry does not see.
    """
    low, high = max(0, -shift), min(size, size - shift)
    first, last = max(low, offset), max(min(high, offset + outputs), max(low, offset))
    missing = [(low, min(first, high)), (min(last, high), high)]
    return (low, high), [span for span in missing if span[0] < span[1]]


def _correlate(x: Tensor, shift: Span, rows: Span, columns: Span) -> Tensor:
    """Sum ``x[q] x[q + shift]^T`` over samples and pixels q of a rectangle: ``[c, c]``."""
    a = x[:, :, slice(*rows), slice(*columns)]
    b = x[
        :, :, rows[0] + shift[0] : rows[1] + shift[0], columns[0] + shift[1] : columns[1] + shift[1]
    ]
    return outer(*(side.permute(0, 2, 3, 1).flatten(0, 2) for side in (a, b)))


def shifted_size(trace: Trace) -> tuple[int, int] | None:
    """Return the size of a layer's input if its autocorrelation is cheaper than copies.

    Compares multiply-adds per sample.
    """
    layer = trace.layer
    if not isinstance(layer, nn.Conv2d) or layer.groups > 1 or layer.padding_mode != "zeros":
        return None
    if layer.stride != (1, 1) or layer.kernel_size == (1, 1):
        return None
    height, width = trace.x.shape[2:]
    strips = Autocorrelation(layer, height, width).strips().values()
    rows, columns = layer.kernel_size
    pixels = rows * (2 * columns - 1) * height * width
    pixels += sum((r[1] - r[0]) * (c[1] - c[0]) for _, r, c in strips)
    shape = trace.shape
    copies = shape.positions * shape.inputs * (shape.inputs + PANEL) / 2
    return (height, width) if pixels * layer.in_channels**2 < copies else None


def covariance(layer: Layer, side: str, size: tuple[int, int] | None) -> Covariance:
    """Start the sum of one side of a layer, shifting inputs of a size or copying patches."""
    if size is not None and isinstance(layer, nn.Conv2d):
        return Autocorrelation(layer, *size)
    return Gram(side)
