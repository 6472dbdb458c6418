"""Pairwise influence of training rows on queries (Koh & Liang 2017, with EK-FAC curvature)."""

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from defense.compute import batches
from defense.errors import ArtifactError
from defense.influence.factors import precondition
from defense.influence.layers import Tape, find_layers, per_sample_gradient, record
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


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of a label minus the log-sum-exp of all others, ``[n]`` (Park et al. 2023)."""
    index = labels[:, None]
    chosen = logits.gather(1, index).squeeze(1)
    return chosen - logits.scatter(1, index, -torch.inf).logsumexp(1)


def pairwise_scores(
    model: nn.Module,
    factors: Factors,
    queries: Queries,
    images: ImageSet,
    settings: ScoreSettings,
) -> NDArray[np.float32]:
    """Score every training row against every query in one pass over the training set.

    ``score[q, n] = -grad margin(q)^T H^-1 grad loss(n)``: positive if training on row n
    raises the margin of the query's label. H is the damped EK-FAC matrix.

    Args:
        model: The model the factors were fitted on; it stays as it is.
        factors: EK-FAC factors.
        queries: Images and the labels whose margins are differentiated.
        images: The training set.
        settings: Damping and batch size.

    Returns:
        float32 ``[q, n]``.

    Raises:
        ArtifactError: The factors belong to another model.
        NumericalError: A layer's Lambda is zero everywhere.
    """
    layers = {n: layer for n, layer in find_layers(model).items() if n in factors.layers}
    if list(layers) != list(factors.layers):
        missing = ", ".join(set(factors.layers) - set(layers))
        raise ArtifactError(f"the model has no layers {missing}, which the factors describe")
    with frozen(model), record(layers) as tape:
        sides = _query_side(model, tape, factors, queries, settings)
        return _train_side(model, tape, sides, images, settings)


def _query_side(
    model: nn.Module, tape: Tape, factors: Factors, queries: Queries, settings: ScoreSettings
) -> dict[str, Tensor]:
    """Preconditioned gradients of the negative margins, ``[q, g*o*i]``, by layer."""
    place = next(model.parameters()).device
    placed = {
        name: LayerFactors(*(part.to(place) for part in vars(layer).values()))
        for name, layer in factors.layers.items()
    }
    parts: dict[str, list[Tensor]] = {name: [] for name in placed}
    for rows in batches(len(queries.labels), settings.batch_size, label="queries"):
        logits = model(queries.images[rows].to(place)).float()
        total = -margin(logits, queries.labels[rows].to(place)).sum()
        for name, pair in tape.pairs(total):
            gradient = precondition(per_sample_gradient(*pair), placed[name], settings.damping)
            parts[name].append(gradient.flatten(1))
    return {name: torch.cat(gradients) for name, gradients in parts.items()}


def _train_side(
    model: nn.Module,
    tape: Tape,
    sides: dict[str, Tensor],
    images: ImageSet,
    settings: ScoreSettings,
) -> NDArray[np.float32]:
    """Contract the loss gradient of every row with all query sides: ``[q, n]``."""
    place = next(model.parameters()).device
    count = len(next(iter(sides.values())))
    scores = np.empty((count, len(images)), dtype=np.float32)
    for rows in batches(len(images), settings.batch_size, label="scores"):
        logits = model(images.images(rows).to(place)).float()
        loss = F.cross_entropy(logits, images.targets(rows).to(place), reduction="sum")
        block = torch.zeros(count, len(rows), device=place)
        for name, pair in tape.pairs(loss):
            block += sides[name] @ per_sample_gradient(*pair).flatten(1).T
        scores[:, rows] = block.cpu().numpy()
    return scores
