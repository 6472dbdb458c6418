"""A row store: short vectors whose inner products are normalised influence.

One pass over the rows sketches the direction of every row's margin gradient in the metric of
``H^-1``; the leading principal components of the sketches, found on some of the rows, keep
what rows have in common and drop most of the sketch's noise. Afterwards any query costs its
own gradient and two products, and any row-by-row matrix costs one.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from defense.artifacts import open_artifact, write_artifact
from defense.checkpoints import Checkpoint, digest_of_images
from defense.compute import batches, progress, seeded
from defense.errors import ArtifactError, DataError
from defense.influence.products import heavy_dtype, product
from defense.influence.sketch import Sketcher
from defense.influence.task import CLASSIFICATION, Task
from defense.method import Method
from defense.records import Factors, ImageSet
from defense.storage import array, read_array

COLUMNS = 2**13  # columns of the sketches that are treated together
GATHER = 4  # batches that are brought to components together
ARRAYS = ("rows", "self_influence", "components", "kept")
TRIAL = 128  # rows on which the strongest coordinates are found


class StoreSettings(Method):
    """How much is kept of every row.

    Attributes:
        components: Numbers kept per row, two bytes each; at most as many as probe rows. None
            keeps the sketches themselves.
        sketch: Numbers of a sketch. Shared by all rows are as many times `components` numbers.
        leading: Eigenvectors of each layer's inputs and outputs that are used; None for all.
        probe: Rows the components are found on; all of them if there are no more.
        damping: Relative to each layer's mean Lambda.
        batch_size: Rows per step.
        seed: Of the signs and of the choice of probe rows.
    """

    components: int | None = Field(4096, gt=0)
    sketch: int = Field(2**19, gt=0)
    leading: tuple[PositiveInt, PositiveInt] | None = None
    probe: int = Field(4096, gt=0)
    damping: float = Field(0.1, gt=0)
    batch_size: int = Field(64, gt=0)
    seed: int = Field(0, ge=0)

    def sketcher(self, model: nn.Module, factors: Factors, task: Task = CLASSIFICATION) -> Sketcher:
        """Prepare for sketches; it may serve many calls."""
        return Sketcher(
            model, factors, self.damping, self.sketch, self.seed, task, leading=self.leading
        )


class DirectionSettings(Method):
    """A store without components that is quick to make, to compare rows and inputs.

    It takes a fraction of the time of the full store; its cosines are those within the span of
    the leading eigenvectors.

    Attributes:
        sketch: Numbers kept per row, two bytes each.
        leading: Eigenvectors of each layer's inputs and outputs that are used; None for all.
        damping: Relative to each layer's mean Lambda.
        batch_size: Rows per step.
        seed: Of the signs.
    """

    sketch: int = Field(2**13, gt=0)
    leading: tuple[PositiveInt, PositiveInt] | None = (128, 64)
    damping: float = Field(0.1, gt=0)
    batch_size: int = Field(64, gt=0)
    seed: int = Field(0, ge=0)

    def store(self) -> StoreSettings:
        """Return the settings of the store."""
        return StoreSettings(components=None, **dict(self))


@dataclass(frozen=True)
class RowStore:
    """Normalised directions of `n` rows in `k` components.

    Attributes:
        rows: float16 ``[n, k]``, memory-mapped.
        self_influence: float32 ``[n]``; ``grad measure^T H^-1 grad measure`` of every row.
        components: bfloat16 as int16 ``[k, sketch]``, memory-mapped; from sketches to vectors.
            None if vectors are sketches.
        kept: Numbers of the coordinates the sketches are made of; see `Sketcher`.
        settings: How it was made.
        origin: See `Sketcher`.
        images: Digest of the rows' pixels and labels.
    """

    rows: NDArray[np.float16]
    self_influence: NDArray[np.float32]
    components: NDArray[np.int16] | None
    kept: NDArray[np.int64]
    settings: StoreSettings
    origin: str
    images: str

    def sketcher(self, model: nn.Module, factors: Factors, task: Task = CLASSIFICATION) -> Sketcher:
        """Prepare to sketch queries for this store; it may serve many calls.

        Raises:
            ArtifactError: The store is of another model, factors, task or version of the code.
        """
        sketcher = self.settings.sketcher(model, factors, task)
        if sketcher.origin != self.origin:
            raise ArtifactError(
                "the row store was made of another model, other factors, another task or by "
                "other code: build it again"
            )
        sketcher.keep(self.kept)
        return sketcher

    def cosine(self, vectors: Tensor) -> NDArray[np.float32]:
        """Cosine of some vectors ``[q, k]`` with every row: ``[q, n]``."""
        dtype = heavy_dtype(vectors.device)
        parts = [
            product(vectors.to(dtype), _shared(self.rows[start : start + COLUMNS]).to(dtype))
            for start in range(0, len(self.rows), COLUMNS)
        ]
        return torch.cat(parts, dim=1).float().numpy()

    def between(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Cosine of some stored rows with every row: ``[m, n]``."""
        return self.cosine(_shared(self.rows[rows]).float())

    def vectors(self, sketches: Tensor) -> Tensor:
        """Bring sketches ``[m, sketch]`` to stored vectors ``[m, k]``."""
        if self.components is None:
            return sketches.cpu().float()
        components = _shared(self.components).view(torch.bfloat16)
        return (sketches.cpu().to(torch.bfloat16) @ components.T).float()

    def save(self, path: Path, *, inputs: dict[str, str] | None = None) -> str:
        """Save as an artefact; returns its digest."""
        parts = {name: getattr(self, name) for name in ARRAYS}
        files = {f"{name}.npy": array(part) for name, part in parts.items() if part is not None}
        meta = {"settings": self.settings.model_dump(mode="json"), "origin": self.origin}
        meta["images"] = self.images
        return write_artifact(path, "row_store", files, meta=meta, inputs=inputs)


def _shared(values: NDArray[Any]) -> Tensor:
    """Show memory to torch, which warns where it is read-only; nobody writes to it here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(values)


def load_store(path: Path) -> RowStore:
    """Open a saved store with its large arrays memory-mapped.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    manifest = open_artifact(path, "row_store")
    settings = StoreSettings(**manifest.fact("settings"))
    names = [name for name in ARRAYS if name != "components" or settings.components is not None]
    parts = {name: read_array(path / f"{name}.npy", mapped=True) for name in names}
    return RowStore(
        parts["rows"],
        parts["self_influence"],
        parts.get("components"),
        parts["kept"],
        settings,
        manifest.fact("origin"),
        manifest.fact("images"),
    )


def build_store(
    model: nn.Module,
    factors: Factors,
    images: ImageSet,
    settings: StoreSettings,
    task: Task = CLASSIFICATION,
    *,
    scratch: Path | None = None,
) -> RowStore:
    """Write the normalised direction of every row in one pass.

    A killed build continues, losing at most a minute.

    Args:
        model: The model the factors were fitted on.
        factors: EK-FAC factors.
        images: The rows.
        settings: How much is kept.
        task: Whose measure is differentiated.
        scratch: Folder for the checkpoints that let a killed build continue, to be deleted when
            the store is saved.

    Raises:
        DataError: There are no rows.
        ArtifactError: The factors belong to another model.
    """
    if not len(images):
        raise DataError("expected rows to store, got none")
    sketcher = settings.sketcher(model, factors, task)
    probe = probe_rows(len(images), settings)
    sketcher.keep(_coordinates(sketcher, images, probe, settings))
    data = digest_of_images(images)
    key = data, settings.model_dump_json().encode(), bytes.fromhex(sketcher.origin)
    steps = [Checkpoint.at(scratch, [*key, step]) for step in (b"probe", b"components", b"rows")]
    own, components, count = np.zeros(len(images), dtype=np.float32), None, sketcher.size
    if settings.components is not None:
        known, own[probe] = _probe(sketcher, images.take(probe), settings.batch_size, steps[0])
        count = min(settings.components, len(probe))
        vectors, components = _principal(known, count, steps[1])
    rows = steps[2].array((len(images), count), np.dtype(np.float16))
    if components is not None:
        rows[probe] = vectors
    store = RowStore(rows, own, components, sketcher.kept, settings, sketcher.origin, data.hex())
    _others(store, sketcher, images, probe, steps[2])
    rows.setflags(write=False)  # it may be the file a killed build continues from
    return store


def probe_rows(count: int, settings: StoreSettings) -> NDArray[np.int64]:
    """Draw the rows, out of `count`, that the components are found on, if there are any."""
    order = torch.randperm(count, generator=seeded(settings.seed, "probe")).numpy()
    return order[: 0 if settings.components is None else settings.probe]


def _coordinates(
    sketcher: Sketcher, images: ImageSet, probe: NDArray[np.int64], settings: StoreSettings
) -> NDArray[np.int64]:
    """Choose the coordinates the sketches are made of; all that leading eigenvectors leave."""
    if settings.leading is not None:
        return np.arange(sketcher.count)
    chosen = probe if len(probe) else np.arange(len(images))
    trial = images.where(np.isin(np.arange(len(images)), chosen[:TRIAL]))
    return sketcher.strongest(trial, settings.batch_size)


def _probe(
    sketcher: Sketcher, images: ImageSet, batch_size: int, checkpoint: Checkpoint
) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """Sketch the probe rows: ``[p, sketch]``, on disk, and their squared norms ``[p]``."""
    known: Any = checkpoint.array((len(images), sketcher.size), np.dtype(np.float16))
    state = checkpoint.load() or {"row": 0, "norms": torch.zeros(len(images))}
    norms = state["norms"].numpy()
    for rows in batches(len(images), batch_size, label="probe rows", first=state["row"]):
        sketches, found = sketcher.sketches(images.images(rows), images.targets(rows))
        known[rows], norms[rows] = sketches.half().cpu().numpy(), found.cpu().numpy()
        if checkpoint.due():
            known.flush()
            checkpoint.save({"row": int(rows[-1]) + 1, "norms": torch.from_numpy(norms)})
    return known, norms


def _others(
    store: RowStore,
    sketcher: Sketcher,
    images: ImageSet,
    probe: NDArray[np.int64],
    checkpoint: Checkpoint,
) -> None:
    """Store the rows that are not probe rows."""
    rest, size = np.delete(np.arange(len(images)), probe), store.settings.batch_size
    stored: Any = store.rows
    kept = torch.float32 if store.components is None else torch.bfloat16
    state = checkpoint.load() or {"row": 0, "norms": torch.from_numpy(store.self_influence)}
    store.self_influence[:] = state["norms"].numpy()
    for places in batches(len(rest), GATHER * size, label="row store", first=state["row"]):
        parts = []
        for batch in np.array_split(rest[places], -(-len(places) // size)):
            sketches, norms = sketcher.sketches(images.images(batch), images.targets(batch))
            store.self_influence[batch] = norms.cpu().numpy()
            parts.append(sketches.cpu().to(kept))
        stored[rest[places]] = store.vectors(torch.cat(parts)).numpy()
        if checkpoint.due():
            stored.flush()
            norms = torch.from_numpy(store.self_influence)
            checkpoint.save({"row": int(places[-1]) + 1, "norms": norms})


def _principal(
    sketches: NDArray[np.float16], count: int, checkpoint: Checkpoint
) -> tuple[NDArray[np.float16], NDArray[np.int16]]:
    """Find the leading components: the sketches in them ``[p, k]``, and them ``[k, sketch]``."""
    components: Any = checkpoint.array((count, sketches.shape[1]), np.dtype(np.int16))
    state = checkpoint.load() or {"block": 0, "gram": torch.zeros(*[len(sketches)] * 2)}
    if "gram" in state:
        for block, part in _blocks(sketches, state["block"], "inner products"):
            state["gram"] += product(part, part)
            checkpoint.save(state | {"block": block + 1})
        values, vectors = map(torch.from_numpy, np.linalg.eigh(state["gram"].double().numpy()))
        roots = values[-count:].clamp_min(torch.finfo(torch.float32).eps).sqrt()
        leading = vectors[:, -count:]
        turn, inside = (leading / roots).T.float().contiguous(), (leading * roots).half()
        state = {"block": 0, "turn": turn, "inside": inside}
    for block, part in _blocks(sketches, state["block"], "components"):
        found = product(state["turn"], part.T).to(torch.bfloat16)
        components[:, block * COLUMNS : (block + 1) * COLUMNS] = found.view(torch.int16).numpy()
        if checkpoint.due():
            components.flush()
            checkpoint.save(state | {"block": block + 1})
    return state["inside"].numpy(), components


def _blocks(sketches: NDArray[np.float16], first: int, label: str) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of columns as float32, with their numbers, from one on."""
    total = -(-sketches.shape[1] // COLUMNS)
    bar = progress(
        iterable=range(first, total), desc=label, unit="block", total=total, initial=first
    )
    for block in bar:
        part = sketches[:, block * COLUMNS : (block + 1) * COLUMNS]
        yield block, torch.from_numpy(part).float()
