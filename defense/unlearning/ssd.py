"""SSD: selective synaptic dampening (Foster et al. 2024; method card 4)."""

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from defense.contracts import Repair, Trainer, Unlearner
from defense.errors import NumericalError
from defense.prediction import logits, predict
from defense.recipe import Recipe
from defense.records import ImageSet, Trained, mask_of
from defense.unlearning.dampening import (
    Importance,
    batch_importance,
    dampened,
    sample_importance,
)
from defense.unlearning.parts import join, part, shuffled

HELD_OUT = 0.1  # share of the retain set that chooses the setting
USELESS = (False, -float("inf"))  # how a setting is ranked that leaves weights that are not finite


class SelectiveSynapticDampening(Unlearner):
    """Shrink the weights that matter much more to the flagged rows than to all rows.

    Of a grid of settings the one is used that keeps most of a held-out part of the retain set
    right, among those under which no affected input keeps the label it was reported with;
    if there is none, the one with the lowest mean margin of that label.

    Attributes:
        alphas: Thresholds on the ratio of importances; the paper's grid is 2, 10, 50, the
            source uses 10.
        strengths: Dampening as a share of the threshold; the paper's grid is 0.01, 0.1, 1; with
            0.1 and a threshold of 10 it is the source's.
        importance: ``batch`` squares the gradient of a batch, as the source's code does;
            ``sample`` that of every row, as its formula says.
        batch_size: Rows per gradient of ``batch``.
        affected: Choose by the first so many affected inputs; None uses all.
    """

    name: Literal["ssd"] = "ssd"
    alphas: tuple[float, ...] = Field((2.0, 10.0, 50.0), min_length=1)
    strengths: tuple[float, ...] = Field((0.01, 0.1, 1.0), min_length=1)
    importance: Literal["batch", "sample"] = "batch"
    batch_size: int = Field(64, gt=0)
    affected: int | None = Field(None, gt=0)

    def max_gradient_samples(self, num_forget: int, num_retain: int, recipe: Recipe) -> int:
        """See `Unlearner.max_gradient_samples`: all rows once, the flagged ones twice."""
        return 2 * num_forget + num_retain

    def remove(self, repair: Repair, trainer: Trainer) -> Trained:
        """See `Unlearner.remove`."""
        model, forget = repair.model, repair.forget
        rows = part(repair.retain, HELD_OUT, trainer.seeds("held out"))
        drawn = mask_of(rows, len(repair.retain))
        held, kept = repair.retain.where(drawn), repair.retain.where(~drawn)
        mix = trainer.seeds("importance")
        every_row = shuffled(join(forget, kept), mix)
        ours = self._importance(model, shuffled(forget, mix), "flagged rows")
        everything = self._importance(model, every_row, "all rows")
        candidates = [
            (alpha, share, dampened(model, ours, everything, alpha, share * alpha))
            for alpha in self.alphas
            for share in self.strengths
        ]
        known = repair.affected
        asked = known.where(np.arange(len(known)) < (self.affected or len(known)))
        scores = [self._judge(candidate, asked, held) for *_, candidate in candidates]
        best = max(range(len(scores)), key=scores.__getitem__)
        if scores[best] == USELESS:
            raise NumericalError(
                "ssd expected a setting that leaves finite weights, found none; look for weights "
                "of the suspect model that are not finite, or train it again"
            )
        alpha, strength, changed = candidates[best]
        chosen = {"alpha": alpha, "strength": strength}
        return Trained(changed, len(forget) + len(every_row), chosen)

    def _importance(self, model: nn.Module, images: ImageSet, label: str) -> Importance:
        label = f"importance, {label}"
        if self.importance == "sample":
            return sample_importance(model, images, label=label)
        return batch_importance(
            model, images, F.cross_entropy, 2, batch_size=self.batch_size, label=label
        )

    def _judge(self, model: nn.Module, affected: ImageSet, held: ImageSet) -> tuple[bool, float]:
        """Rank a setting: first whether it mends the affected inputs, then what it keeps."""
        if not all(bool(value.isfinite().all()) for value in model.parameters()):
            return USELESS
        margin = margins(model, affected)
        if bool((margin < 0).all()):
            return True, float((predict(model, held) == held.labels).mean())
        return False, -float(margin.mean())


def margins(model: nn.Module, affected: ImageSet) -> torch.Tensor:
    """Compute how far the reported label leads over the next best: ``[m]``."""
    said, labels = logits(model, affected), affected.targets()[:, None]
    others = said.scatter(1, labels, -float("inf")).amax(1)
    return said.gather(1, labels)[:, 0] - others
