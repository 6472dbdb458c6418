"""The metric of the damped inverse EK-FAC matrix: preconditioned queries, norms of rows."""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from defense.errors import NumericalError
from defense.influence.contraction import Basis, gradients, tiles
from defense.influence.layers import Shape, Trace
from defense.influence.orders import LARGE_TILE, Frame, Grid, cheapest
from defense.influence.products import Workspace, heavy_dtype, product
from defense.records import Factors, LayerFactors


class Metric:
    """Inner products ``u^T H^-1 v`` of per-sample gradients, at several dampings.

    Attributes:
        layers: Factors by layer name.
        dampings: Relative to each layer's mean Lambda.
        place: The device.
        dtype: Precision of the heavy products; that of the model in the ``exact`` tier.
    """

    def __init__(
        self, factors: Factors, dampings: tuple[float, ...], place: torch.device, dtype: torch.dtype
    ) -> None:
        """Describe the metric of some factors."""
        self.layers, self.dampings, self.place = factors.layers, dampings, place
        self.dtype = heavy_dtype(place) if factors.tier == "fast" else dtype
        self.wide = dtype
        self.space = Workspace()
        self.bases: dict[str, Basis] = {}
        self.means = {name: self._mean(name) for name in self.layers}

    def basis(self, name: str) -> Basis:
        """Return the rotations into a layer's eigenbasis; they are kept."""
        if name not in self.bases:
            self.bases[name] = self.rotations(name)
        return self.bases[name]

    def rotations(self, name: str, *, back: bool = False) -> Basis:
        """Prepare the rotations into a layer's eigenbasis, or back."""
        layer = self.layers[name]
        sides = layer.activation_eigenvectors, layer.gradient_eigenvectors
        return Basis.of(*sides, self.place, self.dtype, back=back)

    def _mean(self, name: str) -> float:
        mean = float(self.layers[name].lambda_matrix.mean())
        smallest = min(self.dampings) * mean
        if not 1 / torch.finfo(self.wide).max < smallest < math.inf:
            raise NumericalError(
                f"expected eigenvalues of layer {name} whose damped inverse is finite, got a mean "
                f"of {mean}: the model is certain of nearly every label; raise the damping, or "
                f"add '{name}' to factors.exclude"
            )
        return mean

    def weight(
        self, name: str, damping: float, cell: tuple[slice, slice] = (slice(None), slice(None))
    ) -> Tensor:
        """Inverse damped eigenvalues of a layer, of some outputs and inputs: ``[g, o, i]``."""
        chosen = self.layers[name].lambda_matrix[:, cell[0], cell[1]]
        eigenvalues = chosen.to(self.place, self.wide)
        return 1 / (eigenvalues + damping * self.means[name])

    def leading(self, inputs: int, outputs: int) -> "Metric":
        """Restrict the metric to the eigenvectors of each side that hold most of it.

        An eigenvector's part is the sum of ``lambda / (lambda + damping)`` over the other side.

        Args:
            inputs: Eigenvectors of a layer's inputs, at most.
            outputs: Eigenvectors of a layer's outputs, at most.
        """
        part = copy.copy(self)
        part.bases, part.layers = {}, {}
        for name, layer in self.layers.items():
            level = min(self.dampings) * self.means[name]
            energy = layer.lambda_matrix / (layer.lambda_matrix + level)
            columns, rows = _largest(energy.sum(1), inputs), _largest(energy.sum(2), outputs)
            kept = layer.lambda_matrix.take_along_dim(rows[:, :, None], 1)
            part.layers[name] = LayerFactors(
                layer.activation_eigenvectors.take_along_dim(columns[:, None], 2),
                layer.gradient_eigenvectors.take_along_dim(rows[:, None], 2),
                kept.take_along_dim(columns[:, None], 2),
            )
        return part


def _largest(values: Tensor, count: int) -> Tensor:
    """Return the places of the largest values of every row, ascending: ``[g, count]``."""
    return values.topk(min(count, values.shape[1])).indices.sort().values


class QuerySide:
    """Preconditioned gradients of `q` queries, by layer, cut into tiles.

    Attributes:
        norms: ``[d, q]``; ``u^T H^-1 u`` of every query.
    """

    def __init__(
        self,
        metric: Metric,
        count: int,
        batch_size: int,
        frames: Mapping[str, Frame],
        shapes: Mapping[str, Shape],
    ) -> None:
        """Make room for queries.

        Args:
            metric: The metric of the inner products.
            count: Number of queries.
            batch_size: Rows they will be contracted with at a time.
            frames: On which sides the rows of a layer are rotated, by name of the layer.
            shapes: Sizes of the layers, of the rows.
        """
        self.metric, self.count = metric, count
        self.frames = {name: frame for name, frame in frames.items() if name in metric.layers}
        self.grids = {
            name: Grid.of(shapes[name], frame, batch_size) for name, frame in self.frames.items()
        }
        self.tiles: dict[str, list[Tensor]] = {}
        size = len(metric.dampings), count
        self.norms = torch.zeros(size, dtype=metric.wide, device=metric.place)

    def __len__(self) -> int:
        """Number of queries times dampings; row ``d * count + q`` is query q at damping d."""
        return self.count * len(self.metric.dampings)

    def put(self, first: int, name: str, trace: Trace) -> None:
        """Precondition the gradients of a batch of queries that starts at number `first`."""
        if name not in self.frames:
            return
        metric, order, frame = self.metric, cheapest(trace.shape), self.frames[name]
        basis, back = metric.rotations(name), metric.rotations(name, back=True)
        parts = gradients(trace, basis, order, metric.dtype, metric.space, LARGE_TILE)
        for part, gradient in parts:
            wide = gradient.to(metric.wide)
            place = first + part.start
            for number, damping in enumerate(metric.dampings):
                room = metric.space.take("scaled", wide.shape, wide.dtype, wide.device)
                scaled = torch.mul(wide, metric.weight(name, damping), out=room)
                self.norms[number, place : place + len(wide)] += (scaled * wide).flatten(1).sum(1)
                plain = scaled.to(metric.dtype)
                plain = plain if frame.inputs else back.inputs(plain)
                plain = plain if frame.outputs else back.outputs.outputs(plain)
                self._store(name, trace.shape, number * self.count + place, plain)

    def _store(self, name: str, shape: Shape, first: int, gradient: Tensor) -> None:
        """Keep gradients ``[m, g, o, i]`` in tiles ``[len, g, outputs, inputs]``."""
        tiles = self.tiles.setdefault(name, [])
        for number, (outputs, inputs) in enumerate(self.grids[name].cells(shape)):
            piece = gradient[:, :, outputs, inputs]
            if number == len(tiles):
                tiles.append(piece.new_empty(len(self), *piece.shape[1:]))
            tiles[number][first : first + len(piece)] = piece

    def contract(self, block: Tensor, norms: Tensor | None, name: str, trace: Trace) -> None:
        """Add a layer's part of all inner products with a batch of rows.

        Args:
            block: With every query: ``[len, n]``.
            norms: With themselves: ``[d, n]``; all frames must be the eigenbasis.
            name: The layer.
            trace: What it saw.
        """
        if name not in self.frames:
            return
        metric, known = self.metric, self.tiles[name]
        frame, grid = self.frames[name], self.grids[name]
        cells = grid.cells(trace.shape)
        parts = tiles(trace, metric.basis(name), frame, grid, metric.dtype, metric.space)
        for part, number, gradient in parts:
            block[:, part] += product(known[number].flatten(1), gradient.flatten(1))
            if norms is not None:
                squares = gradient.to(metric.wide).square().flatten(1)
                for place, damping in zip(norms, metric.dampings, strict=True):
                    place[part] += squares @ metric.weight(name, damping, cells[number]).flatten()
