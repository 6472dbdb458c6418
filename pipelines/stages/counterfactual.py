"""Counterfactuals: does removing what was flagged, and not something else, end the attack?"""

import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

from defense.artifacts import require_input, write_json
from defense.compute import seeded
from defense.metrics import model_quality
from defense.prediction import predict
from defense.records import Flags, ImageSet, Mask, Truth, mask_of
from defense.storage import load_flags, load_images, load_truth
from defense.victim import make_trainer
from pipelines.params import Params
from pipelines.paths import Paths

TRAININGS = 3  # per set, from different weights and orders
SHARE = 1 / 3  # of the flagged rows, to see whether so few would do


def run(params: Params, paths: Paths) -> str:
    """Retrain without each set of rows and write what becomes of the attack."""
    train, manifest = load_images(paths.poisoned_train)
    test, _ = load_images(paths.test)
    probe, _ = load_images(paths.probe)
    affected, _ = load_images(paths.affected)
    truth, truth_manifest = load_truth(paths.truth)
    flags, flags_manifest = load_flags(paths.flags)
    require_input(truth_manifest, "poisoned_train", manifest.digest, owner=paths.truth)
    require_input(flags_manifest, "poisoned_train", manifest.digest, owner=paths.flags)
    generator = seeded(params.seed, "counterfactual")
    removals = counterfactuals(flags, truth, train.labels, generator)
    results: dict[str, Any] = {}
    for name, removed in removals.items():
        trainings = []
        for number in range(TRAININGS):
            model = retrained(params, paths, train.where(~removed), number)
            said = predict(model, test), predict(model, probe)
            fooled = predict(model, affected) == affected.labels
            measured = model_quality(*said, test, probe, truth, affected.ids, fooled)
            trainings.append(measured.model_dump(mode="json"))
        results[name] = {"removed": int(removed.sum()), "trainings": trainings}
    write_json(paths.metrics("counterfactual"), results)
    return "; ".join(
        f"without {name} ({entry['removed']:,} rows): poison success "
        + ", ".join(f"{model['psr']['value']:.1%}" for model in entry["trainings"])
        for name, entry in results.items()
    )


def retrained(params: Params, paths: Paths, rows: ImageSet, number: int) -> nn.Module:
    """Train on some rows, from weights and in an order of its own for every number."""
    trainer = make_trainer(
        params.model,
        params.train,
        seed=params.seed,
        stream=f"counterfactual {number}",
        scratch=paths.scratch("counterfactual"),
    )
    return trainer.fit(rows).model


def counterfactuals(
    flags: Flags, truth: Truth, labels: np.ndarray, generator: torch.Generator
) -> dict[str, Mask]:
    """Name sets of rows to leave out.

    Args:
        flags: A detector's answer.
        truth: What was planted.
        labels: int64 ``[n]``; as they are in the poisoned train set.
        generator: The only source of randomness.

    Returns:
        ``nothing``: no row; ``found``: flagged poison; ``missed``: poison that is not flagged;
        ``any_poison``: as many poisoned rows as were found, at random; ``clean``: as many clean
        rows of the target class, or all of them if they are fewer; ``third``: the most suspicious
        third of the flagged rows, poison or not, which tells whether so few would do; of equally
        suspicious ones the first, of several blocks those furthest beyond their own threshold.
        A set without rows is left out, but for ``nothing``.
    """
    found, missed = flags.mask & truth.poisoned, truth.poisoned & ~flags.mask
    clean = ~truth.poisoned & (labels == truth.target_class)
    count = int(found.sum())
    if clean.sum() < count:
        warnings.warn(
            f"counterfactual clean: the target class has {clean.sum():,} clean rows, fewer than "
            f"the {count:,} poisoned ones that were found; all of them are left out",
            stacklevel=2,
        )
    sets = {
        "found": found,
        "missed": missed,
        "any_poison": _draw(truth.poisoned, count, generator),
        "clean": _draw(clean, count, generator),
        "third": mask_of(foremost(flags, SHARE), len(found)),
    }
    nothing = {"nothing": np.zeros_like(found)}
    return nothing | {name: mask for name, mask in sets.items() if mask.any()}


def foremost(flags: Flags, share: float) -> np.ndarray:
    """Name a share of the flagged rows, the most suspicious ones: ``[k]``."""
    rows = np.flatnonzero(flags.mask)
    order = np.argsort(-flags.suspicion[rows], kind="stable")
    return rows[order[: round(share * len(rows))]]


def _draw(mask: Mask, count: int, generator: torch.Generator) -> Mask:
    """Draw some rows of a set; all of it if it is smaller."""
    rows = np.flatnonzero(mask)
    chosen = rows[torch.randperm(len(rows), generator=generator)[:count].numpy()]
    return mask_of(chosen, len(mask))
