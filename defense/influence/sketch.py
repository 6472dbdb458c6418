"""Short sketches of margin gradients in the metric of ``H^-1``."""

import hashlib
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from defense.compute import batches, device, seeded
from defense.influence.contraction import gradients
from defense.influence.digests import digest_of_factors, require_own_factors
from defense.influence.layers import Trace, Visit
from defense.influence.metric import Metric
from defense.influence.network import Network
from defense.influence.orders import ROTATE_FIRST, cheapest
from defense.influence.products import heavy_dtype, provenance
from defense.influence.task import Task, cotangents
from defense.records import Factors, ImageSet

FOLD = 4  # coordinates that are kept for every number of a sketch


class Sketcher:
    """Keeps the coordinates with the most energy, and folds them with random signs.

    In the eigenbasis, scaled by the root of the inverse damped eigenvalues, the margin gradient
    of a row has as many coordinates as the model has parameters. An inner product of sketches
    of `m` numbers, into which a share `e` of the energy is folded, carries a noise of
    ``e / sqrt(m)``; and what rows have in common lies in the strongest coordinates, so leaving
    the weak ones out costs less than folding them in. With `leading` eigenvectors alone the
    others are not even computed, which takes a fraction of the time, and directions are those
    within their span; with factors of the ``fast`` tier the network runs in bfloat16, too, where
    the hardware does.

    Attributes:
        kept: Numbers of the coordinates in use, ascending, counted through all layers.
        origin: Digest of the model, the factors, the damping, the seed, the task and the code.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: Factors,
        damping: float,
        size: int,
        seed: int,
        task: Task,
        leading: tuple[int, int] | None = None,
    ) -> None:
        """Prepare; `keep` says of which coordinates the sketches are made.

        Args:
            model: The model the factors were fitted on.
            factors: EK-FAC factors.
            damping: Relative to each layer's mean Lambda.
            size: Numbers of a sketch, `m`; no more than there are coordinates are used.
            seed: Of the signs; the same seed draws the same.
            task: Whose measure is differentiated.
            leading: Eigenvectors of each layer's inputs and outputs that are used; None for all.

        Raises:
            ArtifactError: The factors belong to another model.
        """
        require_own_factors(factors, model)
        quick = leading is not None and factors.tier == "fast"
        self.network = Network(model, factors.excluded, heavy_dtype(device()) if quick else None)
        wide = torch.promote_types(self.network.dtype, torch.float32)
        self.metric = Metric(factors, (damping,), self.network.place, wide)
        if leading is not None:
            self.metric = self.metric.leading(*leading)
        self.task, self.seed, self.leading = task, seed, leading
        self.origin = self._origin(factors, damping)
        self.weights = {
            name: self.metric.weight(name, damping).flatten() for name in factors.layers
        }
        self.count = sum(map(len, self.weights.values()))
        self.size = min(size, self.count)

    def keep(self, kept: NDArray[np.int64]) -> None:
        """Use some coordinates only: their numbers, ascending."""
        self.kept = kept
        self.places, self.scales, self.starts = {}, {}, {}
        first, start = 0, 0
        for name, weights in self.weights.items():
            ends = np.searchsorted(kept, (first, first + len(weights)))
            chosen = torch.from_numpy(kept[slice(*ends)] - first).to(weights.device)
            places = slice(None) if len(chosen) == len(weights) else chosen  # all, without a copy
            generator = seeded(self.seed, f"signs:{name}")
            bits = torch.randint(2, weights.shape, generator=generator, dtype=torch.int8)
            signs = (2 * bits - 1).to(weights)[places]
            self.places[name], self.starts[name] = places, start
            self.scales[name] = weights[places].sqrt() * signs
            first, start = first + len(weights), (start + len(chosen)) % self.size

    def strongest(self, images: ImageSet, batch_size: int) -> NDArray[np.int64]:
        """Find the coordinates with the most energy in the directions of some rows."""
        count = FOLD * self.size
        if count >= self.count:
            return np.arange(self.count)
        energy = {name: torch.zeros_like(weights) for name, weights in self.weights.items()}
        for rows in batches(len(images), batch_size, label="coordinates"):
            data = images.images(rows), images.targets(rows)
            norms = torch.zeros(len(rows), dtype=self.metric.wide).to(self.network.place)
            self._differentiate(*data, partial(self._add_norms, norms))
            self._differentiate(*data, partial(self._add_energy, energy, _inverse(norms)))
        total = torch.cat([part.cpu() for part in energy.values()])
        return np.sort(total.topk(count).indices.numpy())

    def sketches(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sketch a batch: unit directions ``[n, size]`` and their squared norms ``[n]``.

        A direction has norm one with all coordinates, less with those that are kept.
        """
        total = torch.zeros(len(images), self.size, dtype=self.metric.wide)
        total = total.to(self.network.place)
        norms = total.new_zeros(len(images))
        self._differentiate(images, labels, partial(self._fold, total, norms))
        return total * _inverse(norms).sqrt()[:, None], norms

    def _differentiate(self, images: Tensor, labels: Tensor, visit: Visit) -> None:
        outputs = self.network.outputs(images)
        slope = cotangents(self.task.measure, outputs, labels.to(outputs.device))
        self.network.backward(outputs, slope, visit)

    def _rotated(self, name: str, trace: Trace) -> Iterator[tuple[slice, Tensor]]:
        """Yield a layer's gradients in the eigenbasis, ``[m, g*o*i]``."""
        if name in self.weights:
            metric, basis = self.metric, self.metric.basis(name)
            order = cheapest(trace.shape) if self.leading is None else ROTATE_FIRST
            for part, gradient in gradients(trace, basis, order, metric.dtype, metric.space):
                yield part, gradient.flatten(1).to(metric.wide)

    def _add_norms(self, norms: Tensor, name: str, trace: Trace) -> None:
        for part, gradient in self._rotated(name, trace):
            norms[part] += gradient.square() @ self.weights[name]

    def _add_energy(
        self, energy: dict[str, Tensor], scale: Tensor, name: str, trace: Trace
    ) -> None:
        for part, gradient in self._rotated(name, trace):
            energy[name] += (scale[part] @ gradient.square()) * self.weights[name]

    def _fold(self, total: Tensor, norms: Tensor, name: str, trace: Trace) -> None:
        for part, gradient in self._rotated(name, trace):
            norms[part] += gradient.square() @ self.weights[name]
            strong = gradient[:, self.places[name]] * self.scales[name]
            done, place = 0, self.starts[name]
            while done < strong.shape[1]:
                piece = strong[:, done : done + self.size - place]
                total[part, place : place + piece.shape[1]] += piece
                done, place = done + piece.shape[1], 0

    def _origin(self, factors: Factors, damping: float) -> str:
        parts = (
            bytes.fromhex(factors.model),
            digest_of_factors(factors),
            f"{damping} {self.seed} {self.leading}".encode(),
            self.task.digest(),
            provenance(self.network.place),
        )
        return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _inverse(norms: Tensor) -> Tensor:
    return 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny)
