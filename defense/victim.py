"""The victim's training, bound once, so that attacks and remediation repeat it as it is."""

from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import nn

from defense.compute import seeded
from defense.contracts import Architecture, Surrogate, Trainer
from defense.models.assemble import build_model
from defense.phases import Phase
from defense.recipe import Recipe
from defense.records import ImageSet, Trained
from defense.statistics import channel_statistics
from defense.training import train


def make_trainer(
    architecture: Architecture, recipe: Recipe, *, seed: int, stream: str, scratch: Path | None
) -> Trainer:
    """Bind an architecture and a recipe to a source of randomness.

    Args:
        architecture: What is trained.
        recipe: How it is trained.
        seed: The run's seed.
        stream: Name of the purpose, such as ``suspect`` or ``remediated``; trainings with
            different streams share no random numbers.
        scratch: Folder for checkpoints of unfinished trainings.
    """

    def seeds(purpose: str) -> torch.Generator:
        return seeded(seed, f"{stream}/{purpose}")

    def fresh(images: ImageSet) -> nn.Module:
        statistics = channel_statistics(images)
        classes = images.num_classes
        return build_model(architecture, images.shape, classes, seeds("weights"), statistics)

    def fit(images: ImageSet) -> Trained:
        phases = [Phase(images, recipe.epochs)]
        label = f"train {stream}"
        return train(fresh(images), phases, recipe, seeds("order"), scratch=scratch, label=label)

    def tune(
        model: nn.Module,
        phases: Sequence[Phase],
        recipe: Recipe,
        *,
        frozen: Collection[str] = (),
    ) -> Trained:
        generator, label = seeds("tuning"), f"tune {stream}"
        return train(model, phases, recipe, generator, frozen=frozen, scratch=scratch, label=label)

    return Trainer(recipe, fresh, fit, tune, seeds)


def make_surrogate(
    architecture: Architecture,
    recipe: Recipe,
    train_set: ImageSet,
    *,
    seed: int,
    scratch: Path | None,
) -> Surrogate:
    """Offer an attacker a model of the victim's kind, trained on clean data when asked for.

    Args:
        architecture: What is trained.
        recipe: How it is trained.
        train_set: The clean train set.
        seed: The run's seed.
        scratch: Folder for checkpoints.
    """
    trainer = make_trainer(architecture, recipe, seed=seed, stream="surrogate", scratch=scratch)
    return Surrogate(recipe, cache(lambda: trainer.fit(train_set).model), scratch)
