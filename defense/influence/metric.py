"""The metric of the damped inverse EK-FAC matrix: preconditioned queries, norms of rows."""

import torch
from torch import Tensor

from defense.errors import NumericalError
from defense.influence.contraction import (
    LARGE_TILE,
    Basis,
    cheapest,
    gradients,
    raw_tiles,
    tile_outputs,
)
from defense.influence.layers import Shape, Trace
from defense.influence.products import Workspace, heavy_dtype, product
from defense.records import Factors


class Metric:
    """Inner products ``u^T H^-1 v`` of per-sample gradients, at several dampings.

    Attributes:
        layers: Factors by layer name.
        dampings: Relative to each layer's mean Lambda.
        place: The device.
        dtype: Precision of the heavy products; that of the model in the ``exact`` tier.
        keep: Whether bases are kept for `add_norms`.
    """

    def __init__(
        self,
        factors: Factors,
        dampings: tuple[float, ...],
        place: torch.device,
        dtype: torch.dtype,
        keep: bool,
    ) -> None:
        """Describe the metric of some factors."""
        self.layers, self.dampings, self.place, self.keep = factors.layers, dampings, place, keep
        self.dtype = heavy_dtype(place) if factors.tier == "fast" else dtype
        self.wide = dtype
        self.space = Workspace()
        self.bases: dict[str, Basis] = {}

    def basis(self, name: str) -> Basis:
        """Return a layer's eigenvectors, kept if they are needed for every batch."""
        known = self.bases.get(name)
        if known is None:
            known = self._rotations(name, back=False)
            if self.keep:
                self.bases[name] = known
        return known

    def back(self, name: str) -> Basis:
        """Return the rotations back from a layer's eigenbasis."""
        return self._rotations(name, back=True)

    def _rotations(self, name: str, *, back: bool) -> Basis:
        layer = self.layers[name]
        sides = layer.activation_eigenvectors, layer.gradient_eigenvectors
        return Basis.of(*sides, self.place, self.dtype, back=back)

    def weights(self, name: str) -> Tensor:
        """Inverse damped eigenvalues of a layer: ``[d, g, o, i]``."""
        eigenvalues = self.layers[name].lambda_matrix.to(self.place, self.wide)
        mean = eigenvalues.mean()
        inverse = torch.stack([1 / (eigenvalues + damping * mean) for damping in self.dampings])
        if not inverse.isfinite().all():
            raise NumericalError(
                f"expected eigenvalues of layer {name} whose damped inverse is finite, got a mean "
                f"of {float(mean)}: the model is saturated, train it again or raise the damping"
            )
        return inverse

    def add_norms(self, norms: Tensor, name: str, trace: Trace) -> None:
        """Add a layer's part of ``v^T H^-1 v`` to `norms` ``[d, n]``."""
        if name not in self.layers:
            return
        basis, weights = self.basis(name), self.weights(name).flatten(1)
        order = cheapest(trace.shape)
        for part, gradient in gradients(trace, basis, order, self.dtype, self.space):
            norms[:, part] += weights @ gradient.to(self.wide).square_().flatten(1).T


class QuerySide:
    """Preconditioned gradients of `q` queries, by layer, cut into tiles of outputs.

    Attributes:
        norms: ``[d, q]``; ``u^T H^-1 u`` of every query.
    """

    def __init__(self, metric: Metric, count: int, batch_size: int) -> None:
        """Make room for `count` queries, to be contracted with batches of a size."""
        self.metric, self.count, self.batch_size = metric, count, batch_size
        self.tiles: dict[str, list[Tensor]] = {}
        size = len(metric.dampings), count
        self.norms = torch.zeros(size, dtype=metric.wide, device=metric.place)

    def __len__(self) -> int:
        """Number of queries times dampings; row ``d * count + q`` is query q at damping d."""
        return self.count * len(self.metric.dampings)

    def put(self, first: int, name: str, trace: Trace) -> None:
        """Precondition the gradients of a batch of queries that starts at number `first`."""
        if name not in self.metric.layers:
            return
        metric, order = self.metric, cheapest(trace.shape)
        basis, weights = metric.basis(name), metric.weights(name)
        back, tile = metric.back(name), LARGE_TILE
        for part, gradient in gradients(trace, basis, order, metric.dtype, metric.space, tile):
            wide = gradient.to(metric.wide)
            place = first + part.start
            for number, weight in enumerate(weights):
                room = metric.space.take("scaled", wide.shape, wide.dtype, wide.device)
                scaled = torch.mul(wide, weight, out=room)
                self.norms[number, place : place + len(wide)] += (scaled * wide).flatten(1).sum(1)
                plain = back.outputs.outputs(back.inputs(scaled.to(metric.dtype)))
                self._store(name, trace.shape, number * self.count + place, plain)

    def _store(self, name: str, shape: Shape, first: int, gradient: Tensor) -> None:
        """Keep gradients ``[m, g, o, i]`` in tiles ``[len, g, outputs, i]``."""
        step = tile_outputs(shape, self.batch_size)
        tiles = self.tiles.setdefault(name, [])
        for number, start in enumerate(range(0, shape.outputs, step)):
            piece = gradient[:, :, start : start + step]
            if number == len(tiles):
                tiles.append(piece.new_empty(len(self), *piece.shape[1:]))
            tiles[number][first : first + len(piece)] = piece

    def contract(self, block: Tensor, name: str, trace: Trace) -> None:
        """Add a layer's part of all inner products with a batch of rows: ``[len, n]``."""
        if name not in self.metric.layers:
            return
        metric, tiles = self.metric, self.tiles[name]
        width = tiles[0].shape[2]
        for part, number, gradient in raw_tiles(trace, width, metric.dtype, metric.space):
            block[:, part] += product(tiles[number].flatten(1), gradient.flatten(1))
