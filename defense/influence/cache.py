"""Results kept under a digest of all they depend on: weights, pixels, labels, settings, code.

A result of anything else has another name, and a damaged one is computed again, so nothing
stale is ever used. Computations that were killed continue from the same folder.
"""

import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from defense.artifacts import open_artifact, write_artifact
from defense.checkpoints import fingerprint
from defense.compute import device
from defense.errors import ArtifactError
from defense.influence.digests import digest_of_factors, digest_of_queries
from defense.influence.factors import FactorSettings, fit_factors
from defense.influence.products import provenance
from defense.influence.scores import Influence, ScoreSettings, compute_influence
from defense.influence.task import CLASSIFICATION, Task
from defense.influence.weighing import drawn
from defense.records import Factors, ImageSet, Queries
from defense.storage import array, load_factors, read_array, save_factors

T = TypeVar("T")


def cached_factors(
    folder: Path,
    model: nn.Module,
    images: ImageSet,
    settings: FactorSettings,
    generator: torch.Generator,
    task: Task = CLASSIFICATION,
) -> Factors:
    """Return `fit_factors` of the same arguments, computed at most once.

    Args:
        folder: Where results and checkpoints lie.
        model: The suspect model.
        images: The training set.
        settings: How to estimate.
        generator: Draws labels; afterwards it stands where `fit_factors` leaves it.
        task: Loss and label distribution of the model.
    """
    place = _place(
        folder,
        "factors",
        fingerprint(model, images),
        settings.model_dump_json().encode(),
        generator.get_state().numpy().tobytes(),
        task.digest(),
    )
    kept = _open(place, lambda path: load_factors(path)[0])
    if kept is None:
        with _unfinished(place) as scratch:
            kept = fit_factors(model, images, settings, generator, task, scratch=scratch)
            save_factors(place, kept, inputs={})
    else:
        drawn(images, settings.max_rows, generator)
    return kept


def cached_influence(
    folder: Path,
    model: nn.Module,
    factors: Factors,
    queries: Queries,
    images: ImageSet,
    settings: ScoreSettings,
    task: Task = CLASSIFICATION,
    *,
    dampings: tuple[float, ...] = (),
    self_influence: bool = False,
) -> Influence:
    """Return `compute_influence` of the same arguments, computed at most once.

    Args:
        folder: Where results and checkpoints lie.
        model: The model the factors were fitted on.
        factors: EK-FAC factors.
        queries: Images and labels whose measure is differentiated.
        images: The rows to score.
        settings: Damping, batch size and memory.
        task: Measure and loss.
        dampings: Instead of the one in `settings`.
        self_influence: Whether the rows' own norms are computed too.
    """
    place = _place(
        folder,
        "influence",
        fingerprint(model, images),
        digest_of_factors(factors),
        digest_of_queries(queries),
        settings.model_dump_json().encode(),
        f"{dampings} {self_influence}".encode(),
        task.digest(),
    )
    kept = _open(place, _load_influence)
    if kept is None:
        with _unfinished(place) as scratch:
            kept = compute_influence(
                model, factors, queries, images, settings, task,
                dampings=dampings, self_influence=self_influence, scratch=scratch,
            )  # fmt: skip
            files = {f"{name}.npy": array(values) for name, values in vars(kept).items()}
            write_artifact(place, "influence", files)
    return kept


def _place(folder: Path, kind: str, *parts: bytes) -> Path:
    digest = hashlib.sha256(b"\0".join([*parts, provenance(device())]))
    return folder / f"{kind}-{digest.hexdigest()[:32]}"


@contextmanager
def _unfinished(place: Path) -> Iterator[Path]:
    """Lend a folder for the checkpoint of a result, which goes when the result is written."""
    scratch = place.with_name(f"{place.name}.unfinished")
    yield scratch
    shutil.rmtree(scratch, ignore_errors=True)


def _open(place: Path, load: Callable[[Path], T]) -> T | None:
    """Load a kept result; one that does not have the bytes it was sealed with is not used."""
    if not place.exists():
        return None
    try:
        return load(place)
    except ArtifactError as error:
        warnings.warn(f"computing again: {error}", stacklevel=3)
        return None


def _load_influence(path: Path) -> Influence:
    open_artifact(path, "influence")
    names = Influence.__dataclass_fields__
    return Influence(**{name: read_array(path / f"{name}.npy", mapped=True) for name in names})
