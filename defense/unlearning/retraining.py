"""EU: exact unlearning by retraining (method card 4)."""

from typing import Literal

from torch import nn

from defense.contracts import Trainer, Unlearner
from defense.records import ImageSet, Trained


class ExactUnlearning(Unlearner):
    """Train a fresh model on the rows that are left; the reference all others approximate."""

    name: Literal["eu"] = "eu"

    def unlearn(
        self, model: nn.Module, forget: ImageSet, retain: ImageSet, trainer: Trainer
    ) -> Trained:
        """See `Unlearner.unlearn`."""
        return trainer.fit(retain)
