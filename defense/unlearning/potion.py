"""Potion: dampening until the flagged rows are forgotten (Schoepf et al. 2024; card 9)."""

import logging
import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from defense.contracts import Repair, Trainer, Unlearner
from defense.errors import NumericalError
from defense.prediction import predict
from defense.recipe import Recipe
from defense.records import Trained
from defense.unlearning.dampening import Importance, batch_importance, dampened
from defense.unlearning.parts import shuffled

logger = logging.getLogger(__name__)

GROWTH = 1.1  # of the share of dampened parameters from one try to the next
MAX_TRIES = 500


class Potion(Unlearner):
    """Shrink a growing share of the weights until the flagged labels are forgotten.

    The importance of a weight is its effect on the length of the logits, which needs no labels.
    The weights with the largest ratio of importance for the flagged rows to that for the rest
    are shrunk by that ratio; the share grows by 10 % until the accuracy on the flagged rows
    falls. It assumes that most flagged rows are poison.

    Attributes:
        forget_accuracy: The search ends when the accuracy on the flagged rows is this share of
            what it was.
        batch_size: Rows per gradient.
    """

    name: Literal["potion"] = "potion"
    forget_accuracy: float = Field(0.2, ge=0, lt=1)
    batch_size: int = Field(64, gt=0)

    def max_gradient_samples(self, num_forget: int, num_retain: int, recipe: Recipe) -> int:
        """See `Unlearner.max_gradient_samples`: every row once."""
        return num_forget + num_retain

    def remove(self, repair: Repair, trainer: Trainer) -> Trained:
        """See `Unlearner.remove`."""
        model, forget, retain = repair.model, repair.forget, repair.retain
        mix = trainer.seeds("importance")
        ours, rest = (
            batch_importance(
                model,
                shuffled(part, mix),
                _length,
                1,
                batch_size=self.batch_size,
                label=f"importance, {name}",
            )
            for name, part in (("flagged rows", forget), ("other rows", retain))
        )
        ratios = _ratios(ours, rest)
        share = len(forget) / (25 * (len(forget) + len(retain)))
        bound = self.forget_accuracy * (predict(model, forget) == forget.labels).mean()
        for _ in range(MAX_TRIES):
            off = math.log(1 + 100 * share)  # per cent of the weights, at most 50 after all tries
            alpha = float(ratios[int(len(ratios) * off / 100)])
            changed = dampened(model, ours, rest, alpha, 1.0)
            left = float((predict(changed, forget) == forget.labels).mean())
            if left <= bound:
                break
            share *= GROWTH
        else:
            logger.warning("potion: the flagged labels are not forgotten after %d tries", MAX_TRIES)
        chosen = {"alpha": alpha, "weights": off / 100, "forget_accuracy": left}
        return Trained(changed, len(forget) + len(retain), chosen)


def _length(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.norm(dim=1).mean()


def _ratios(ours: Importance, rest: Importance) -> Tensor:
    """Sort the finite ratios of importances of all weights, largest first.

    Raises:
        NumericalError: There are none.
    """
    ratios = torch.cat([(ours[name] / rest[name]).reshape(-1) for name in ours])
    finite = ratios[ratios.isfinite()]
    if not len(finite):
        raise NumericalError(
            "potion expected weights that matter to the other rows' logits, found none: the "
            "model's output does not depend on its input; train it again"
        )
    return finite.sort(descending=True).values
