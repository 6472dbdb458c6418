"""EU: exact unlearning by retraining (method card 4)."""

from typing import Literal

from defense.contracts import Repair, Trainer, Unlearner
from defense.recipe import Recipe
from defense.records import Trained


class ExactUnlearning(Unlearner):
    """Train a fresh model on the rows that are left; the reference all others approximate."""

    name: Literal["eu"] = "eu"

    def max_gradient_samples(self, num_forget: int, num_retain: int, recipe: Recipe) -> int:
        """See `Unlearner.max_gradient_samples`: the original training's."""
        return recipe.epochs * num_retain

    def remove(self, repair: Repair, trainer: Trainer) -> Trained:
        """See `Unlearner.remove`."""
        return trainer.fit(repair.retain)
