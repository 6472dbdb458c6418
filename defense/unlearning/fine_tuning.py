"""CF: catastrophic forgetting by fine-tuning (Goel et al. 2022; method card 4)."""

from typing import Literal

from pydantic import Field
from torch import nn

from defense.contracts import Trainer, Unlearner
from defense.records import ImageSet, Trained


class CatastrophicForgetting(Unlearner):
    """Train the suspect model further on the rows that are left, on a small budget.

    Attributes:
        budget: Epochs as a share of the epochs the suspect model was trained for; at least
            one epoch is run.
        learning_rate: Peak learning rate; None takes the one of the original training.
    """

    name: Literal["cf"] = "cf"
    budget: float = Field(0.2, gt=0, le=0.5)
    learning_rate: float | None = Field(None, gt=0)

    def unlearn(
        self, model: nn.Module, forget: ImageSet, retain: ImageSet, trainer: Trainer
    ) -> Trained:
        """See `Unlearner.unlearn`."""
        original = trainer.recipe
        recipe = original.model_copy(
            update={
                "epochs": max(1, round(self.budget * original.epochs)),
                "learning_rate": self.learning_rate or original.learning_rate,
            }
        )
        return trainer.tune(model, retain, recipe)
