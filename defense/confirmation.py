"""Does the wrong prediction die with the flagged rows, and only with them."""

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from defense.contracts import Trainer
from defense.evidence import Confirmation
from defense.method import Method
from defense.phases import Phase
from defense.prediction import logits
from defense.records import Flags, ImageSet


class ConfirmSettings(Method):
    """How flagged rows are unlearnt, cheaply and in part, to see what that does.

    Attributes:
        points: Numbers of rows that are tried, each twice the one before, up to all flagged.
        retain: Rows that are trained on as they are, drawn at random.
        forget: Draws of the rows to be unlearnt, at least as many as there are, which are trained
            towards no class at all, and of other rows with their labels, which keep them, so that
            no class as such is unlearnt.
        learning_rate: Of stochastic gradient descent, whatever trained the model; constant.
    """

    points: int = Field(6, gt=0)
    retain: int = Field(2048, gt=0)
    forget: int = Field(512, gt=0)
    learning_rate: float = Field(0.02, gt=0)


def confirm(
    model: nn.Module,
    train: ImageSet,
    flags: Flags,
    affected: ImageSet,
    trainer: Trainer,
    settings: ConfirmSettings,
) -> Confirmation:
    """Unlearn the most suspicious rows, and as many unflagged ones, and ask the affected inputs.

    An affected input is an oracle that needs no truth: if the flagged rows dictate its
    prediction, unlearning them ends it; unlearning as many others with the same labels does not.

    Args:
        model: The suspect model; it stays as it is.
        train: Its training set.
        flags: A detector's answer.
        affected: The affected inputs, labelled as predicted.
        trainer: Trains without any view of test data.
        settings: How rows are unlearnt.
    """
    rows, drawn = np.flatnonzero(flags.mask), trainer.seeds("others")
    ranked = rows[np.argsort(-flags.suspicion[rows], kind="stable")]
    others = np.flatnonzero(np.isin(train.labels, affected.labels) & ~flags.mask)
    others = others[torch.randperm(len(others), generator=drawn).numpy()]
    counts = [-(-len(rows) // 2**n) for n in reversed(range(settings.points))] if len(rows) else []
    before = _belief(model, affected)
    points = []
    for count in sorted(set(counts)):
        beliefs = [
            _belief(_without(model, train, part[:count], trainer, settings), affected)
            for part in (ranked, others)
            if len(part) >= count
        ]
        points.append((count, beliefs[0], beliefs[1] if len(beliefs) > 1 else None))
    return Confirmation(before, tuple(points))


def _belief(model: nn.Module, affected: ImageSet) -> float:
    """Mean probability of the labels that the affected inputs were given."""
    chances = torch.softmax(logits(model, affected, label="affected").double(), dim=1)
    return float(chances.gather(1, affected.targets()[:, None]).mean())


def _without(
    model: nn.Module,
    train: ImageSet,
    forgotten: NDArray[np.int64],
    trainer: Trainer,
    settings: ConfirmSettings,
) -> nn.Module:
    """Train a copy on some rows as they are, and on others towards no class."""
    rest = np.setdiff1d(np.arange(len(train)), forgotten)
    order = torch.randperm(len(rest), generator=trainer.seeds("retained")).numpy()
    rest = rest[order]
    alike = rest[np.isin(train.labels[rest], train.labels[forgotten])]
    draws = max(settings.forget, len(forgotten))
    balance = np.resize(alike, draws) if len(alike) else alike
    retained = np.concatenate([rest[: settings.retain], balance])
    images = train.take(np.concatenate([retained, np.resize(forgotten, draws)]))

    def objective(network: nn.Module, batch: Tensor, rows: NDArray[np.int64]) -> Tensor:
        chances = network(batch).float().log_softmax(dim=1)
        own = chances.gather(1, images.targets(rows).to(batch.device)[:, None])[:, 0]
        forget = torch.from_numpy(rows >= len(retained)).to(batch.device)
        return -torch.where(forget, chances.mean(dim=1), own).mean()

    phase = Phase(images, 1, objective, name=f"no class beyond row {len(retained)}")
    changes = {"learning_rate": settings.learning_rate, "schedule": "constant"}
    recipe = trainer.recipe.model_copy(update=changes | {"optimizer": "sgd"})
    return trainer.tune(model, [phase], recipe).model
