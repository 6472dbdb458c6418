"""What removing the default detector's flags does to a suspect model of the benchmark."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.suspects import Suspect, fooled, trainer_of
from defense.compute import seeded
from defense.contracts import Repair, Unlearner
from defense.detectors.normalised_influence import NormalisedInfluence
from defense.prediction import predict
from defense.records import Case, Flags, ImageSet, Queries, mask_of
from defense.unlearning.fine_tuning import CatastrophicForgetting
from defense.unlearning.retraining import ExactUnlearning
from pipelines.stages.counterfactual import SHARE, foremost

SMALLEST = {"sig_1"}  # attacks of which it is asked whether a third of the flags would do
UNLEARNERS: dict[str, Unlearner] = {"eu": ExactUnlearning(), "cf": CatastrophicForgetting()}


def repaired(suspect: Suspect) -> dict[str, Any]:
    """Remove what is flagged for one affected input of every attack, and measure the models.

    Beside them stands the same model, trained without the poisons, and for some attacks without
    the most suspicious third of the flags: if that does not do, no set of a third of their size
    is likely to.

    Returns:
        Flags, poison among them, and PSR of every attack and accuracy of every model; empty if
        an attack has no success.
    """
    places = [fooled(suspect, poisoned)[0] for poisoned in suspect.poisoned]
    if not all(map(len, places)):
        return {}
    affected = [
        poisoned.probe.take(own[:1]) for poisoned, own in zip(suspect.poisoned, places, strict=True)
    ]
    target = suspect.poisoned[0].truth.target_class
    flags = default_flags(suspect, affected, target)
    hits = int((flags.mask & suspect.planted).sum())
    found: dict[str, Any] = {"flagged": int(flags.mask.sum()), "planted": hits}
    trainer = trainer_of(suspect.world, suspect.seed, "remediated", None)
    left_out = {"clean": suspect.planted}
    if suspect.name in SMALLEST:
        left_out["third"] = mask_of(foremost(flags, SHARE), len(flags.mask))
    for name, mask in left_out.items():
        found[name] = quality(suspect, trainer.fit(suspect.train.where(~mask)).model)
    forget, retain = suspect.train.where(flags.mask), suspect.train.where(~flags.mask)
    labelled = replace(affected[0], labels=np.full(1, target))
    for name, unlearner in UNLEARNERS.items():
        done = unlearner.unlearn(Repair(suspect.model, forget, retain, labelled), trainer)
        found[name] = quality(suspect, done.model)
    return found


def default_flags(suspect: Suspect, affected: list[ImageSet], target: int) -> Flags:
    """Ask the default detector about affected inputs that were given a label."""
    images = torch.cat([part.images() for part in affected])
    numbers = torch.arange(len(images))
    queries = Queries(
        images, torch.full((len(images),), target), numbers, torch.zeros_like(numbers)
    )
    scores = np.zeros((len(images), len(suspect.train)), dtype=np.float32)  # not looked at
    case = Case(
        suspect.train, suspect.model, queries, scores, suspect.directions, suspect.split.test
    )
    return NormalisedInfluence().detect(case, seeded(suspect.seed, "detect"))


def quality(suspect: Suspect, model: nn.Module) -> dict[str, Any]:
    """Measure accuracy, and the success of every attack."""
    test = suspect.split.test
    right: NDArray[np.bool_] = predict(model, test, label="test") == test.labels
    success = [
        float((predict(model, attack.probe, label="probe") == attack.truth.target_class).mean())
        for attack in suspect.poisoned
    ]
    return {"accuracy": float(right.mean()), "psr": success}
