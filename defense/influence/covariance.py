"""Uncentred covariances of activations and output gradients, summed batch by batch.

For a convolution the usual way copies every pixel once per kernel offset and multiplies the
copies. Where the stride is 1 the same matrix follows from the autocorrelation of the input:
its block for two kernel offsets depends on their difference alone, except for strips along
the border of the image that one of them does not see. A 3x3 kernel needs 13 products of
``[c, c]`` and 16 thin ones instead of 81, and no copies.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from defense.influence.contraction import GROUP, balanced
from defense.influence.layers import Trace, activations, output_gradients
from defense.influence.products import Workspace, outer

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
        plane = self._plane(trace.x, dtype, space)
        for name, (shift, rows, columns) in self.terms().items():
            self.accumulate(name, _correlate(plane, self.width, shift, rows, columns))
        if self.layer.bias is not None:
            wide = torch.promote_types(dtype, torch.float32)
            self.accumulate("sums", plane[:, : self.width].sum(2, dtype=wide))
            self.accumulate("count", plane.new_tensor([len(trace) * trace.positions], dtype=wide))

    def _plane(self, x: Tensor, dtype: torch.dtype, space: Workspace) -> Tensor:
        """Lay out the input as ``[h, w + gap, n, c]``; in the gap rows meet without mixing."""
        n, channels, height, width = x.shape
        gap = self.layer.dilation[1] * (self.layer.kernel_size[1] - 1)
        plane = space.take("plane", (height, width + gap, n, channels), dtype, x.device)
        plane[:, :width].copy_(x.permute(2, 3, 0, 1))
        plane[:, width:] = 0
        return plane

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

    def _blocks(self) -> Iterator[tuple[int, int, list[tuple[int, str]]]]:
        """Yield every pair of kernel entries and the signed terms its block is the sum of."""
        offsets = self._offsets()
        for first, (row, column) in enumerate(offsets):
            for second in range(first, len(offsets)):
                shift = offsets[second][0] - row, offsets[second][1] - column
                yield (
                    first,
                    second,
                    [
                        (sign, _name(shift, *spans))
                        for sign, spans in self._spans(row, column, shift)
                    ],
                )

    def _spans(
        self, row: int, column: int, shift: tuple[int, int]
    ) -> Iterator[tuple[int, tuple[Span, Span]]]:
        """Write the rectangle a pair of kernel entries sees as the whole image minus strips."""
        outputs = self._outputs()
        sides = [
            _split(size, offset, step, count)
            for size, offset, step, count in zip(
                (self.height, self.width), (row, column), shift, outputs, strict=True
            )
        ]
        (all_rows, missing_rows), (all_columns, missing_columns) = sides
        yield 1, (all_rows, all_columns)
        yield from ((-1, (rows, all_columns)) for rows in missing_rows)
        yield from ((-1, (all_rows, columns)) for columns in missing_columns)
        yield from ((1, (rows, columns)) for rows in missing_rows for columns in missing_columns)

    def terms(self) -> dict[str, tuple[tuple[int, int], Span, Span]]:
        """Every product that some block needs, once."""
        offsets, terms = self._offsets(), {}
        for first, (row, column) in enumerate(offsets):
            for other in offsets[first:]:
                shift = other[0] - row, other[1] - column
                for _, spans in self._spans(row, column, shift):
                    terms[_name(shift, *spans)] = (shift, *spans)
        return terms

    def total(self) -> Tensor:
        """See `Covariance.total`."""
        entries, channels = len(self._offsets()), self.layer.in_channels
        some = next(iter(self.parts.values()))
        blocks = some.new_zeros(entries, channels, entries, channels)
        for first, second, terms in self._blocks():
            block = sum((sign * self.parts[name] for sign, name in terms), torch.zeros(()))
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


def _name(shift: tuple[int, int], rows: Span, columns: Span) -> str:
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


def _correlate(
    plane: Tensor, width: int, shift: tuple[int, int], rows: Span, columns: Span
) -> Tensor:
    """Sum ``x[q] x[q + shift]^T`` over samples and pixels q of a rectangle: ``[c, c]``."""
    _, pitch, n, channels = plane.shape
    if rows[0] >= rows[1] or columns[0] >= columns[1]:
        return plane.new_zeros(channels, channels)
    if columns[1] - columns[0] == width - abs(shift[1]):
        flat = plane.view(-1, channels)  # whole rows: one product, the gap adds zeros
        start, step = rows[0] * pitch * n, (shift[0] * pitch + shift[1]) * n
        length = min((rows[1] - rows[0]) * pitch * n, len(flat) - start - step)
        return outer(flat[start:][:length], flat[start + step :][:length])
    a = plane[slice(*rows), slice(*columns)]
    b = plane[
        rows[0] + shift[0] : rows[1] + shift[0], columns[0] + shift[1] : columns[1] + shift[1]
    ]
    return outer(a.reshape(-1, channels), b.reshape(-1, channels))


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
    terms = Autocorrelation(layer, height, width).terms().values()
    pixels = sum((r[1] - r[0]) * (c[1] - c[0]) for _, r, c in terms)
    shape = trace.shape
    copies = shape.positions * shape.inputs * (shape.inputs + PANEL) / 2
    return (height, width) if pixels * layer.in_channels**2 < copies else None
