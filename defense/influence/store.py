"""A row store: short vectors whose inner products are normalised influence.

The direction of a row's margin gradient in the metric of ``H^-1`` has as many coordinates as
the model has parameters. One pass over the rows adds random signs to them and folds them into
a sketch; the leading principal components of the sketches, found on some of the rows, keep
what rows have in common and drop most of the sketch's noise. Afterwards any query costs its
own gradient and one product with the stored vectors, and so does any row-by-row matrix.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from defense.artifacts import open_artifact, write_artifact
from defense.checkpoints import Checkpoint
from defense.compute import batches, progress, seeded
from defense.errors import ArtifactError
from defense.influence.contraction import cheapest, gradients
from defense.influence.layers import Trace
from defense.influence.metric import Metric
from defense.influence.network import Network
from defense.influence.products import product
from defense.influence.scores import digest_of_factors
from defense.influence.task import CLASSIFICATION, Task, cotangents
from defense.method import Method
from defense.records import Factors, ImageSet, Queries
from defense.storage import array, read_array

COLUMNS = 2**14  # columns of the sketches that are treated together


class StoreSettings(Method):
    """How much is kept of every row.

    Attributes:
        components: Numbers kept per row, two bytes each.
        sketch: Numbers of a sketch; its noise in a cosine is one over their root.
        probe: Rows the components are found on; all of them if there are no more.
        damping: Relative to each layer's mean Lambda.
        batch_size: Rows per step.
        seed: Of the signs and of the choice of probe rows.
    """

    components: int = Field(512, gt=0)
    sketch: int = Field(2**18, gt=0)
    probe: int = Field(4096, gt=0)
    damping: float = Field(0.1, gt=0)
    batch_size: int = Field(64, gt=0)
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class RowStore:
    """Normalised directions of `n` rows in `k` components.

    Attributes:
        rows: float16 ``[n, k]``, memory-mapped.
        self_influence: float32 ``[n]``; ``grad measure^T H^-1 grad measure`` of every row.
        components: float16 ``[sketch, k]``; from sketches to stored vectors.
        settings: How it was made.
        origin: Digest of the model and the factors.
    """

    rows: NDArray[np.float16]
    self_influence: NDArray[np.float32]
    components: NDArray[np.float16]
    settings: StoreSettings
    origin: str

    def cosine(self, vectors: Tensor) -> NDArray[np.float32]:
        """Cosine of some vectors ``[q, k]`` with every row: ``[q, n]``."""
        parts = [
            (vectors @ torch.from_numpy(self.rows[start : start + COLUMNS]).float().T).numpy()
            for start in range(0, len(self.rows), COLUMNS)
        ]
        return np.concatenate(parts, axis=1)

    def between(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Cosine of some stored rows with every row: ``[m, n]``."""
        return self.cosine(torch.from_numpy(self.rows[rows]).float())

    def vectors(self, sketches: Tensor) -> Tensor:
        """Bring sketches ``[m, sketch]`` to stored vectors ``[m, k]``."""
        total = torch.zeros(len(sketches), self.components.shape[1])
        for start in range(0, len(self.components), COLUMNS):
            part = torch.from_numpy(self.components[start : start + COLUMNS]).float()
            total += sketches[:, start : start + COLUMNS].float().cpu() @ part
        return total

    def save(self, path: Path, *, inputs: dict[str, str] | None = None) -> str:
        """Save as an artefact; returns its digest."""
        files = {
            "rows.npy": array(self.rows),
            "self_influence.npy": array(self.self_influence),
            "components.npy": array(self.components),
        }
        meta = {"settings": self.settings.model_dump(mode="json"), "origin": self.origin}
        return write_artifact(path, "row_store", files, meta=meta, inputs=inputs)


def load_store(path: Path) -> RowStore:
    """Open a saved store with its arrays memory-mapped.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    manifest = open_artifact(path, "row_store")
    return RowStore(
        read_array(path / "rows.npy", mapped=True),
        read_array(path / "self_influence.npy"),
        read_array(path / "components.npy", mapped=True),
        StoreSettings(**manifest.fact("settings")),
        manifest.fact("origin"),
    )


class Sketcher:
    """Folds margin gradients, in the metric of ``H^-1``, into short random sketches."""

    def __init__(
        self, model: nn.Module, factors: Factors, settings: StoreSettings, task: Task
    ) -> None:
        """Draw the signs; the same seed draws the same."""
        self.network = Network(model, factors.excluded)
        place, dtype = self.network.place, self.network.dtype
        self.metric = Metric(factors, (settings.damping,), place, dtype)
        self.settings, self.task = settings, task
        self.origin = _origin(model, factors)
        self.scales = {name: self._scale(name) for name in factors.layers}
        sizes = [len(scale) for scale in self.scales.values()]
        starts = np.cumsum([0, *sizes]) % settings.sketch  # one layer after the other
        self.starts = dict(zip(self.scales, starts.tolist(), strict=False))

    def _scale(self, name: str) -> Tensor:
        """Root of the inverse damped eigenvalues with random signs: ``[g*o*i]``."""
        weights = self.metric.weights(name)[0].flatten()
        generator = seeded(self.settings.seed, f"signs:{name}")
        bits = torch.randint(2, weights.shape, generator=generator, dtype=torch.int8)
        return weights.sqrt() * (2 * bits - 1).to(weights)

    def sketches(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sketch a batch: unit directions ``[n, sketch]`` and their squared norms ``[n]``."""
        outputs = self.network.outputs(images)
        total = torch.zeros(len(images), self.settings.sketch).to(outputs)
        norms = total.new_zeros(len(images))
        slope = cotangents(self.task.measure, outputs, labels.to(outputs.device))
        self.network.backward(outputs, slope, partial(self._fold, total, norms))
        return total / norms.clamp_min(torch.finfo(norms.dtype).tiny).sqrt()[:, None], norms

    def _fold(self, total: Tensor, norms: Tensor, name: str, trace: Trace) -> None:
        if name not in self.scales:
            return
        metric, scale, width = self.metric, self.scales[name], self.settings.sketch
        order, basis = cheapest(trace.shape), metric.basis(name)
        for part, gradient in gradients(trace, basis, order, metric.dtype, metric.space):
            flat = gradient.flatten(1).to(metric.wide) * scale
            norms[part] += flat.square().sum(1)
            done, place = 0, self.starts[name]
            while done < flat.shape[1]:
                piece = flat[:, done : done + width - place]
                total[part, place : place + piece.shape[1]] += piece
                done, place = done + piece.shape[1], 0


def _origin(model: nn.Module, factors: Factors) -> str:
    weights = hashlib.sha256(digest_of_factors(factors))
    for name, value in sorted(model.state_dict().items()):
        weights.update(name.encode() + value.detach().cpu().contiguous().float().numpy().tobytes())
    return weights.hexdigest()


def build_store(
    model: nn.Module,
    factors: Factors,
    images: ImageSet,
    settings: StoreSettings,
    task: Task = CLASSIFICATION,
) -> RowStore:
    """Write the normalised direction of every row in one pass.

    Args:
        model: The model the factors were fitted on.
        factors: EK-FAC factors.
        images: The rows.
        settings: How much is kept.
        task: Whose measure is differentiated.
    """
    sketcher = Sketcher(model, factors, settings, task)
    order = torch.randperm(len(images), generator=seeded(settings.seed, "probe")).numpy()
    probe, rest = order[: settings.probe], order[settings.probe :]
    known = Checkpoint(None).array((len(probe), settings.sketch), np.dtype(np.float16))
    own = np.empty(len(images), dtype=np.float32)
    for places in batches(len(probe), settings.batch_size, label="probe rows"):
        known[places], own[probe[places]] = _sketch(sketcher, images, probe[places])
    vectors, components = _principal(known, min(settings.components, len(probe)))
    rows = Checkpoint(None).array((len(images), vectors.shape[1]), np.dtype(np.float16))
    rows[probe] = vectors
    store = RowStore(rows, own, components, settings, sketcher.origin)
    for places in batches(len(rest), settings.batch_size, label="row store"):
        sketch, own[rest[places]] = _sketch(sketcher, images, rest[places])
        rows[rest[places]] = store.vectors(torch.from_numpy(sketch).float()).numpy()
    return store


def _sketch(
    sketcher: Sketcher, images: ImageSet, rows: NDArray[np.int64]
) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    sketches, norms = sketcher.sketches(images.images(rows), images.targets(rows))
    return sketches.half().cpu().numpy(), norms.cpu().numpy()


def _principal(
    sketches: NDArray[np.float16], count: int
) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Find the leading components: the sketches in them ``[p, k]``, and them ``[sketch, k]``."""
    gram = torch.zeros(len(sketches), len(sketches))
    starts = range(0, sketches.shape[1], COLUMNS)
    for start in progress(iterable=starts, desc="components", unit="block"):
        part = torch.from_numpy(sketches[:, start : start + COLUMNS]).float()
        gram += product(part, part)
    values, vectors = torch.linalg.eigh(gram)
    roots = values[-count:].clamp_min(torch.finfo(torch.float32).eps).sqrt()
    leading = vectors[:, -count:]
    components = np.empty((sketches.shape[1], count), dtype=np.float16)
    for start in starts:
        part = torch.from_numpy(sketches[:, start : start + COLUMNS]).float()
        components[start : start + COLUMNS] = (part.T @ (leading / roots)).numpy()
    return (leading * roots).half().numpy(), components


def query_store(store: RowStore, sketcher: Sketcher, queries: Queries) -> NDArray[np.float32]:
    """Cosine of queries with every stored row, without touching the rows: ``[q, n]``.

    Args:
        store: The store.
        sketcher: One of the same model, factors and settings; it may serve many calls.
        queries: Images and labels whose measure is differentiated.

    Raises:
        ArtifactError: The sketcher has another model, other factors or other settings.
    """
    if (sketcher.settings, sketcher.origin) != (store.settings, store.origin):
        raise ArtifactError(
            f"expected a sketcher of the store's model, factors and settings ({store.settings}), "
            f"got another one ({sketcher.settings})"
        )
    parts = []
    for rows in batches(len(queries.labels), store.settings.batch_size, label="queries"):
        sketches, _ = sketcher.sketches(queries.images[rows], queries.labels[rows])
        parts.append(store.cosine(store.vectors(sketches)))
    return np.concatenate(parts)
