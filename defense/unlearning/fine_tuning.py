"""CF: catastrophic forgetting by fine-tuning (Goel et al. 2022; method card 4)."""

from typing import Literal

from pydantic import Field

from defense.contracts import Repair, Trainer, Unlearner
from defense.phases import Phase
from defense.recipe import Recipe
from defense.records import Trained
from defense.training import all_but_last

TIMES = 3  # the original learning rate: at once that rate a backdoor often stays


class CatastrophicForgetting(Unlearner):
    """Train the suspect model further on the rows that are left, on a small budget.

    Attributes:
        budget: Epochs as a share of the epochs the suspect model was trained for; at least
            one epoch is run. 1 is the Delta-Influence authors' setting.
        learning_rate: Peak learning rate; None takes three times that of the original training.
        last_layers: Train only the last so many convolutions and linear layers, with what
            follows them; None trains all.
    """

    name: Literal["cf"] = "cf"
    budget: float = Field(0.4, gt=0, le=1)
    learning_rate: float | None = Field(None, gt=0)
    last_layers: int | None = Field(None, gt=0)

    def _epochs(self, recipe: Recipe) -> int:
        return max(1, round(self.budget * recipe.epochs))

    def max_gradient_samples(self, num_forget: int, num_retain: int, recipe: Recipe) -> int:
        """See `Unlearner.max_gradient_samples`."""
        return self._epochs(recipe) * num_retain

    def remove(self, repair: Repair, trainer: Trainer) -> Trained:
        """See `Unlearner.remove`."""
        original = trainer.recipe
        epochs = self._epochs(original)
        rate = self.learning_rate or TIMES * original.learning_rate
        recipe = original.model_copy(update={"epochs": epochs, "learning_rate": rate})
        frozen = all_but_last(repair.model, self.last_layers) if self.last_layers else ()
        return trainer.tune(repair.model, [Phase(repair.retain, epochs)], recipe, frozen=frozen)
