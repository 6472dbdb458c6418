"""The victim's training, bound once, so that remediation repeats it without knowing its parts."""

from pathlib import Path

from torch import nn

from defense.compute import seeded
from defense.contracts import Architecture, Trainer
from defense.models.assemble import build_model, channel_statistics
from defense.recipe import Recipe
from defense.records import ImageSet, Trained
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

    def fit(images: ImageSet) -> Trained:
        model = build_model(
            architecture,
            images.shape,
            images.num_classes,
            seeded(seed, f"{stream}/weights"),
            channel_statistics(images),
        )
        generator = seeded(seed, f"{stream}/order")
        return train(model, images, recipe, generator, scratch=scratch, label=f"train {stream}")

    def tune(model: nn.Module, images: ImageSet, other: Recipe) -> Trained:
        generator = seeded(seed, f"{stream}/tuning")
        return train(model, images, other, generator, scratch=scratch, label=f"tune {stream}")

    return Trainer(recipe, fit, tune)
