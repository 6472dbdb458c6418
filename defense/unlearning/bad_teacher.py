"""BadT: a random teacher for the flagged rows (Chundawat et al. 2023; method card 4)."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from defense.contracts import Repair, Trainer, Unlearner
from defense.phases import Phase
from defense.recipe import Recipe
from defense.records import Trained
from defense.unlearning.distillation import asked, divergence, teacher
from defense.unlearning.parts import join, part


class BadTeacher(Unlearner):
    """Teach the model an untrained model's answers on the flagged rows, its own on others.

    Attributes:
        epochs: Passes over the flagged rows and a part of the others; 1 in the source.
        retain_share: The part of the others; 0.3 in the source.
        learning_rate: Of Adam; 0.0001 in the source.
        batch_size: Rows per step; 256 in the source.
    """

    name: Literal["badt"] = "badt"
    epochs: int = Field(1, gt=0)
    retain_share: float = Field(0.3, gt=0, le=1)
    learning_rate: float = Field(1e-4, gt=0)
    batch_size: int = Field(256, gt=1)

    def max_gradient_samples(self, num_forget: int, num_retain: int, recipe: Recipe) -> int:
        """See `Unlearner.max_gradient_samples`."""
        return self.epochs * (num_forget + max(1, round(self.retain_share * num_retain)))

    def remove(self, repair: Repair, trainer: Trainer) -> Trained:
        """See `Unlearner.remove`."""
        forget, retain = repair.forget, repair.retain
        competent, incompetent = teacher(repair.model), teacher(trainer.fresh(retain))
        drawn = part(retain, self.retain_share, trainer.seeds("retain share"))
        images = join(forget, retain.take(drawn))
        num_forget = len(forget)

        def objective(model: nn.Module, batch: Tensor, rows: NDArray[np.int64]) -> Tensor:
            flagged = torch.from_numpy(rows < num_forget)[:, None].to(batch.device)
            wanted = torch.where(flagged, asked(incompetent, batch), asked(competent, batch))
            return divergence(model(batch), wanted)

        recipe = Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=0.0,
            schedule="constant",
            optimizer="adam",
            precision=trainer.recipe.precision,
        )
        phase = Phase(images, self.epochs, objective, f"{self.model_dump_json()} {num_forget}")
        return trainer.tune(repair.model, [phase], recipe)
