"""What a computation will take, told before it starts: orders of products, time and memory."""

import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from defense.compute import trim_memory
from defense.errors import DefenseError
from defense.influence.layers import Shape, Trace
from defense.influence.network import Network
from defense.influence.orders import (
    BATCHED,
    GROUP,
    LARGE_TILE,
    TILE,
    Frame,
    cheapest,
    cheapest_squares,
)
from defense.influence.products import product
from defense.records import ImageSet, Tier

GIB = 2**30
SAMPLE_ROWS = 4  # rows a forecast is measured on
SLACK = 1.25  # allowance for what allocators keep beyond what is in use
SOLVER = 40  # bytes an eigenproblem takes for every entry, in float64
LEAST_BATCH = 8  # rows below which more passes over the data are better than smaller batches
PROBE = 1024  # width of the product whose rate is measured


@dataclass(frozen=True)
class Memory:
    """What may be used.

    Attributes:
        batch_size: Rows per step, unless the limit asks for fewer.
        limit: GiB the whole process may take; None for no limit.
    """

    batch_size: int
    limit: float | None

    def batch(self, fixed: float, per_row: float) -> int:
        """Find the largest power of two that fits, at most the wanted size; 0 if none does.

        Args:
            fixed: Bytes needed whatever the batch size.
            per_row: Bytes needed for each row of a batch.
        """
        if self.limit is None:
            return self.batch_size
        rows = int((self.limit * GIB - resident() - SLACK * fixed) / (SLACK * per_row))
        return min(self.batch_size, 2 ** (rows.bit_length() - 1)) if rows > 0 else 0

    def refuse(self, fixed: float, per_row: float) -> DefenseError:
        """Say what the least memory would be."""
        needed = (resident() + SLACK * (fixed + per_row)) / GIB
        return DefenseError(
            f"memory_limit is {self.limit or 0:g} GiB, but at least {needed:.2f} GiB are needed: "
            "raise it, or exclude the widest layers"
        )


def resident() -> float:
    """Bytes of memory this process holds now; its peak where the system does not say."""
    trim_memory()
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Survey:
    """What a few rows tell about a network.

    Attributes:
        shapes: Sizes of every layer's per-sample gradient, by name.
        row_bytes: Memory one row of a batch takes, forward and backward.
        row_seconds: Time one row takes, forward and backward.
        macs_per_second: Rate of large products.
    """

    shapes: dict[str, Shape]
    row_bytes: float
    row_seconds: float
    macs_per_second: float

    @property
    def widest(self) -> int:
        """Entries of the largest basis."""
        return max(s.groups * max(s.inputs, s.outputs) ** 2 for s in self.shapes.values())

    @property
    def work(self) -> int:
        """Bytes of the buffers of a step; at least one sample has to fit into each."""
        sizes = self.shapes.values()
        group = max(GROUP, *(s.groups * s.positions * s.inputs for s in sizes))
        tile = max(LARGE_TILE, *(s.groups * s.outputs * s.inputs for s in sizes))
        return 4 * (group + 2 * TILE) + 28 * tile


def survey(network: Network, images: ImageSet) -> Survey:
    """Run a few rows forward and backward, watching memory and time."""
    rows = np.arange(min(SAMPLE_ROWS, len(images)))
    kept: dict[int, int] = {}

    def watch(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    _run(network, images, rows)  # which prepares kernels and memory
    begin = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(watch, lambda value: value):
        traces = _run(network, images, rows)
    seconds = time.perf_counter() - begin
    weights = sum(p.numel() * p.element_size() for p in network.model.parameters())
    seen = sum(_bytes(trace) for trace in traces.values())
    size = max(sum(kept.values()) - weights, 0) + seen
    shapes = {name: traces[name].shape for name in network.tape.order if name in traces}
    return Survey(shapes, size / len(rows), seconds / len(rows), _rate(network))


def _run(network: Network, images: ImageSet, rows: NDArray[np.int64]) -> dict[str, Trace]:
    outputs, _ = network.rows(images, rows)
    traces: dict[str, Trace] = {}
    network.backward(outputs, torch.ones_like(outputs), traces.__setitem__)
    return traces


def _bytes(trace: Trace) -> int:
    """Memory of what a layer saw, and of the largest copy of it."""
    return 3 * trace.x.numel() * trace.x.element_size() + 2 * trace.gradient.numel() * 4


def _rate(network: Network) -> float:
    matrix = torch.ones(PROBE, PROBE, device=network.place)
    product(matrix, matrix)
    begin = time.perf_counter()
    float(product(matrix, matrix)[0, 0])
    return PROBE**3 / (time.perf_counter() - begin)


@dataclass(frozen=True)
class Forecast:
    """What a computation will take.

    Attributes:
        what: Its name.
        orders: Order of products of every layer, by name, with sizes and cost.
        batch_size: Rows per step.
        num_passes: Passes over the rows.
        seconds: Estimated time.
        gib: Estimated peak memory of the process.
    """

    what: str
    orders: Mapping[str, str]
    batch_size: int
    num_passes: int
    seconds: float
    gib: float

    def __str__(self) -> str:
        """Say it, one line per layer and one for the whole."""
        width = max(map(len, self.orders))
        lines = [f"  {name:{width}}  {order}" for name, order in self.orders.items()]
        minutes = f"{self.seconds / 60:.1f} min" if self.seconds > 90 else f"{self.seconds:.0f} s"
        whole = (
            f"{self.what}: about {minutes} and {self.gib:.1f} GiB in {self.num_passes} passes "
            f"with batches of {self.batch_size}"
        )
        return "\n".join([whole, *lines])


@dataclass(frozen=True)
class ScoreForecast(Forecast):
    """What scores will take, and the decisions it rests on.

    Attributes:
        frames: Sides on which rows are rotated, by name of the layer.
        shapes: Sizes of every layer's per-sample gradient, of the rows.
    """

    frames: Mapping[str, Frame]
    shapes: Mapping[str, Shape]


def forecast_factors(network: Network, images: ImageSet, tier: Tier, memory: Memory) -> Forecast:
    """Forecast the fit of the factors.

    The time of ``fast`` is that of all rows; it usually needs the gradients of few.

    Raises:
        DefenseError: The memory limit is too small.
    """
    known = survey(network, images)
    macs, orders, bases, squares = 0.0, {}, 0, 0
    for name, shape in known.shapes.items():
        order = cheapest_squares(shape)
        sides = shape.groups * (shape.inputs**2 + shape.outputs**2)
        bases += 4 * sides
        squares += 4 * shape.groups * shape.inputs * shape.outputs
        macs += order.cost(shape) + shape.positions * sides / 4
        orders[name] = f"{_size(shape)}  lambda {order}, {order.cost(shape) / 1e6:,.0f} M"
    # Beside the bases either one eigenproblem, or the packed bases and the squares.
    copies = sum(part.nbytes for part in network.model.parameters()) if tier == "fast" else 0
    fixed = known.work + copies + bases + max(SOLVER * known.widest, bases + squares)
    batch = memory.batch(fixed, known.row_bytes)
    if batch == 0:
        raise memory.refuse(fixed, known.row_bytes)
    passes = 2.0 if tier == "exact" else 2.4
    each = passes * known.row_seconds + macs / known.macs_per_second
    solved = sum(
        shape.groups * (shape.inputs**3 + shape.outputs**3) for shape in known.shapes.values()
    )
    seconds = len(images) * each + 8 * solved / known.macs_per_second
    gib = (resident() + fixed + batch * known.row_bytes) / GIB
    num_passes = 2 if tier == "exact" else 3
    what = "EK-FAC factors, " + (tier if tier == "exact" else f"{tier}, if all rows are needed")
    return Forecast(what, orders, batch, num_passes, seconds, gib)


@dataclass(frozen=True)
class QueryLoad:
    """What has to be held to score.

    Attributes:
        count: Distinct queries.
        dampings: Dampings.
        number_bytes: Of one number of a preconditioned gradient.
        norms: Whether the rows' own norms are computed.
    """

    count: int
    dampings: int
    number_bytes: int
    norms: bool


def forecast_scores(
    network: Network, images: ImageSet, load: QueryLoad, memory: Memory
) -> ScoreForecast:
    """Forecast pairwise scores.

    Raises:
        DefenseError: The memory limit is too small.
    """
    known, held = survey(network, images), load.count * load.dampings
    rows, macs, per_pass, orders, elements, bases = len(images), 0.0, 0.0, {}, 0, 0
    frames = {
        name: Frame.of(shape, rows, held, load.norms) for name, shape in known.shapes.items()
    }  # from all queries, so that groups of them give the same numbers
    for name, shape in known.shapes.items():
        size, order, frame = (
            shape.groups * shape.outputs * shape.inputs,
            cheapest(shape),
            frames[name],
        )
        elements += size
        bases += shape.groups * (frame.inputs * shape.inputs**2 + frame.outputs * shape.outputs**2)
        per_pass += rows * BATCHED * shape.positions * size + frame.cost(shape, rows, 0)
        macs += held * (rows * size + order.cost(shape)) + frame.cost(shape, 0, held)
        orders[name] = f"{_size(shape)}  queries {order}, {frame}"
    fixed = known.work + 24 * known.widest + load.number_bytes * bases
    each_query = load.dampings * elements * load.number_bytes
    passes, batch = _passes(memory, fixed, known.row_bytes, load.count, each_query)
    work = (macs + passes * per_pass) / known.macs_per_second
    seconds = rows * known.row_seconds * passes + work
    gib = (resident() + fixed + load.count * each_query / passes + batch * known.row_bytes) / GIB
    what = f"scores, {held:,} queries"
    return ScoreForecast(what, orders, batch, passes, seconds, gib, frames, known.shapes)


def _passes(
    memory: Memory, fixed: float, per_row: float, num_queries: int, per_query: float
) -> tuple[int, int]:
    """Find the fewest passes whose queries fit beside a reasonable batch; returns its size too."""
    for passes in range(1, num_queries + 1):
        group = -(-num_queries // passes)
        batch = memory.batch(fixed + group * per_query, per_row)
        if batch >= min(memory.batch_size, LEAST_BATCH) or (batch and passes == num_queries):
            return passes, batch
    raise memory.refuse(fixed + per_query, per_row)


def _size(shape: Shape) -> str:
    groups = f"{shape.groups} groups of " if shape.groups > 1 else ""
    return f"{groups}{shape.outputs} x {shape.inputs} at {shape.positions} positions"
