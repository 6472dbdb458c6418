"""Pairwise influence of training rows on queries (Koh & Liang 2017, with EK-FAC curvature)."""

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from defense.compute import batches
from defense.errors import ArtifactError
from defense.influence.factors import precondition
from defense.influence.layers import Tape, find_layers, per_sample_gradient, record
from defense.influence.task import CLASSIFICATION, Task
from defense.method import Method
from defense.records import Factors, ImageSet, LayerFactors, Queries
from defense.training import frozen


class ScoreSettings(Method):
    """How scores are computed.

    Attributes:
        batch_size: Rows per step; bounds the memory, does not change the result.
        damping: Relative to each layer's mean Lambda.
    """

    batch_size: int = Field(64, gt=0)
    damping: float = Field(0.1, gt=0)


def pairwise_scores(
    model: nn.Module,
    factors: Factors,
    queries: Queries,
    images: ImageSet,
    settings: ScoreSettings,
    task: Task = CLASSIFICATION,
) -> NDArray[np.float32]:
    """Score every training row against every query in one pass over the training set.

    ``score[q, n] = -grad measure(q)^T H^-1 grad loss(n)``: positive if training on row n
    raises the measurement, which for classification is the margin of the query's label. H is
    the damped EK-FAC matrix.

    Args:
        model: The model the factors were fitted on; it stays as it is.
        factors: EK-FAC factors.
        queries: Images and the labels whose margins are differentiated.
        images: The training set.
        settings: Damping and batch size.
        task: Loss of the rows and measurement of the queries.

    Returns:
        float32 ``[q, n]``.

    Raises:
        ArtifactError: The factors belong to another model.
    """
    known = find_layers(model)
    missing = factors.layers.keys() - known.keys()
    if missing:
        raise ArtifactError(
            f"the factors describe layers the model does not have: {', '.join(sorted(missing))}; "
            "run: dvc repro factors"
        )
    layers = {name: known[name] for name in factors.layers}
    with frozen(model), record(layers) as tape:
        scorer = _Scorer(model, tape, settings, task)
        return scorer.train_side(scorer.query_side(factors, queries), images)


class _Scorer:
    """Both sides of the score, with what they share."""

    def __init__(self, model: nn.Module, tape: Tape, settings: ScoreSettings, task: Task) -> None:
        self.model, self.tape, self.settings, self.task = model, tape, settings, task
        self.place = next(model.parameters()).device

    def query_side(self, factors: Factors, queries: Queries) -> dict[str, Tensor]:
        """Preconditioned gradients of the negative measurement, ``[q, g*o*i]``, by layer."""
        placed = {
            name: LayerFactors(*(part.to(self.place) for part in vars(layer).values()))
            for name, layer in factors.layers.items()
        }
        parts: dict[str, list[Tensor]] = {name: [] for name in placed}
        damping = self.settings.damping
        for rows in batches(len(queries.labels), self.settings.batch_size, label="queries"):
            outputs = self.model(queries.images[rows].to(self.place)).float()
            total = -self.task.measure(outputs, queries.labels[rows].to(self.place)).sum()
            for name, pair in self.tape.pairs(total, len(rows)):
                gradient = precondition(per_sample_gradient(*pair), placed[name], damping)
                parts[name].append(gradient.flatten(1))
        return {name: torch.cat(gradients) for name, gradients in parts.items()}

    def train_side(self, sides: dict[str, Tensor], images: ImageSet) -> NDArray[np.float32]:
        """Contract the loss gradient of every row with all query sides: ``[q, n]``."""
        count = len(next(iter(sides.values())))
        scores = np.empty((count, len(images)), dtype=np.float32)
        for rows in batches(len(images), self.settings.batch_size, label="scores"):
            outputs = self.model(images.images(rows).to(self.place)).float()
            loss = self.task.loss(outputs, images.targets(rows).to(self.place)).sum()
            block = torch.zeros(count, len(rows), device=self.place)
            for name, pair in self.tape.pairs(loss, len(rows)):
                block += sides[name] @ per_sample_gradient(*pair).flatten(1).T
            scores[:, rows] = block.cpu().numpy()
        return scores
