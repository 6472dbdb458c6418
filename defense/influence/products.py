"""Matrix products at the speed the hardware offers, and the memory they are written to."""

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import scipy
import torch
from torch import Tensor

from defense import compute, records
from defense.checkpoints import source_digest
from defense.compute import has_bf16

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)  # on CPUs its fp32 kernel can be twice as fast as the BLAS behind torch.matmul

CODE = source_digest(Path(__file__).parent, Path(compute.__file__), Path(records.__file__))

PACKED = (torch.float32, torch.bfloat16)
WIDE = 128  # columns from which `product` sums outer products faster than the BLAS does
DEEP, LARGE = 32, 2**23  # multiply-adds from which one product at a time beats a batch of them


def heavy_dtype(place: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it with fp32 accumulation, else float32."""
    return torch.bfloat16 if has_bf16(place) else torch.float32


def provenance(place: torch.device) -> bytes:
    """Name what a result depends on beside its inputs: code, libraries, device, precision."""
    versions = torch.__version__, np.__version__, scipy.__version__
    return CODE + f"{versions} {place.type} {heavy_dtype(place)}".encode()


def packed(right: Tensor) -> Tensor:
    """Bring the right side ``[n, k]`` of many products into the layout of the hardware."""
    if _ONEDNN and right.device.type == "cpu" and right.dtype in PACKED:
        return cast(Tensor, cast(Any, torch.ops.mkldnn)._reorder_linear_weight(right.contiguous()))
    return right


def product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply ``[m, k]`` by the transpose of ``[n, k]``: ``[m, n]`` in the operands' dtype.

    The right side may be `packed`.
    """
    if right.is_mkldnn or (_ONEDNN and left.is_cpu and left.dtype == torch.float32):
        operation = cast(Any, torch.ops.mkldnn)._linear_pointwise
        plain = right if right.is_mkldnn else _dense(right)
        return cast(Tensor, operation(_dense(left), plain, None, "none", [], ""))
    return left @ right.T


def _dense(matrix: Tensor) -> Tensor:
    """Copy a matrix unless it or its transpose is contiguous; others can be 1,000 times slower."""
    return matrix if matrix.T.is_contiguous() else matrix.contiguous()


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum outer products of rows: ``[n, a]`` and ``[n, b]`` to ``[a, b]``."""
    if left.dtype == torch.float32 and min(left.shape[1], right.shape[1]) >= WIDE:
        return product(left.T, right.T)
    return left.T @ right


def outer_each(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Do the same for every pair of a batch: ``[b, n, x]`` and ``[b, n, y]`` to ``[b, x, y]``."""
    single = left.is_cpu and left.dtype == torch.float32
    if _ONEDNN and single and left.shape[1] >= DEEP and out[0].numel() * left.shape[1] >= LARGE:
        for one, other, place in zip(left, right, out, strict=True):
            place.copy_(product(one.T, other.T))
        return out
    return torch.bmm(left.transpose(1, 2), right, out=out)


class Workspace:
    """Buffers that serve batch after batch.

    Fresh memory costs a page fault for every few KiB written, which made writing per-sample
    gradients four times slower than computing them.
    """

    def __init__(self) -> None:
        """Start without buffers."""
        self.buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, place: torch.device
    ) -> Tensor:
        """Return an uninitialised tensor; it is valid until the name is taken again."""
        key, size = (name, dtype, place), math.prod(shape)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[key] = torch.empty(size, dtype=dtype, device=place)
        return buffer[:size].view(shape)
