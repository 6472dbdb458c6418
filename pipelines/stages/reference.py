"""Flags that no detector could give, to measure unlearners by: what was planted, or chance."""

import numpy as np
import torch

from defense.artifacts import require_input
from defense.compute import seeded
from defense.errors import DataError
from defense.records import Flags, Mask, Truth
from defense.storage import load_images, load_truth, save_flags
from pipelines.params import Params
from pipelines.paths import REFERENCES, Paths


def run(params: Params, paths: Paths) -> str:
    """Write the flags that the name of the cell's fourth part asks for."""
    kind = paths.detection.name
    if kind not in REFERENCES:
        raise DataError(f"expected a cell whose fourth part is one of {', '.join(REFERENCES)}")
    train, manifest = load_images(paths.poisoned_train)
    truth, truth_manifest = load_truth(paths.truth)
    require_input(truth_manifest, "poisoned_train", manifest.digest, owner=paths.truth)
    mask = flagged(kind, truth, seeded(params.seed, "reference"))
    everything = np.ones_like(mask)
    flags = Flags(
        mask.astype(np.float32), 0.5, everything, np.asarray(train.labels == truth.target_class)
    )
    origin = {"truth": truth_manifest.digest, "poisoned_train": manifest.digest}
    save_flags(paths.flags, flags, inputs=origin)
    return f"{kind}: {mask.sum():,} of {len(train):,} rows flagged"


def flagged(kind: str, truth: Truth, generator: torch.Generator) -> Mask:
    """Mark the poisoned rows, equally many clean ones at random, or none."""
    if kind == "truth":
        return truth.poisoned
    mask = np.zeros_like(truth.poisoned)
    if kind == "chance":
        clean = np.flatnonzero(~truth.poisoned)
        drawn = torch.randperm(len(clean), generator=generator).numpy()
        mask[clean[drawn[: truth.poisoned.sum()]]] = True
    return mask
