"""Counterfactuals: does removing what was flagged, and not something else, end the attack?"""

import numpy as np
import torch

from defense.artifacts import require_input, write_json
from defense.compute import seeded
from defense.metrics import model_quality
from defense.prediction import predict
from defense.records import Mask, Truth, mask_of
from defense.storage import load_flags, load_images, load_truth
from defense.victim import make_trainer
from pipelines.params import Params
from pipelines.paths import Paths


def run(params: Params, paths: Paths) -> str:
    """Retrain without each of four sets of rows and write what becomes of the attack."""
    train, manifest = load_images(paths.poisoned_train)
    test, _ = load_images(paths.test)
    probe, _ = load_images(paths.probe)
    affected, _ = load_images(paths.affected)
    truth, truth_manifest = load_truth(paths.truth)
    flags, flags_manifest = load_flags(paths.flags)
    require_input(truth_manifest, "poisoned_train", manifest.digest, owner=paths.truth)
    require_input(flags_manifest, "poisoned_train", manifest.digest, owner=paths.flags)
    removals = counterfactuals(
        flags.mask, truth, train.labels, seeded(params.seed, "counterfactual")
    )
    trainer = make_trainer(
        params.model,
        params.train,
        seed=params.seed,
        stream="remediated",
        scratch=paths.scratch("counterfactual"),
    )
    results = {}
    for name, removed in removals.items():
        model = trainer.fit(train.where(~removed)).model
        said = predict(model, test), predict(model, probe)
        measured = model_quality(*said, test, probe, truth, affected.ids)
        results[name] = {"removed": int(removed.sum())} | measured.model_dump(mode="json")
    write_json(paths.metrics("counterfactual"), results)
    return "; ".join(
        f"without {name} ({entry['removed']:,} rows): poison success {entry['psr']['value']:.1%}"
        for name, entry in results.items()
    )


def counterfactuals(
    flagged: Mask, truth: Truth, labels: np.ndarray, generator: torch.Generator
) -> dict[str, Mask]:
    """Name sets of rows to leave out.

    Args:
        flagged: bool ``[n]``.
        truth: What was planted.
        labels: int64 ``[n]``; as they are in the poisoned train set.
        generator: The only source of randomness.

    Returns:
        ``found``: flagged poison; ``missed``: poison that is not flagged; ``any_poison``: as many
        poisoned rows as were found, at random; ``clean``: as many clean rows of the target class.
    """
    found, missed = flagged & truth.poisoned, truth.poisoned & ~flagged
    clean = ~truth.poisoned & (labels == truth.target_class)
    count = int(found.sum())
    return {
        "found": found,
        "missed": missed,
        "any_poison": _draw(truth.poisoned, count, generator),
        "clean": _draw(clean, count, generator),
    }


def _draw(mask: Mask, count: int, generator: torch.Generator) -> Mask:
    """Draw some rows of a set; all of it if it is smaller."""
    rows = np.flatnonzero(mask)
    chosen = rows[torch.randperm(len(rows), generator=generator)[:count].numpy()]
    return mask_of(chosen, len(mask))
