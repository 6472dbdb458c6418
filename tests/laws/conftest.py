"""A trained model and a repair of it, shared by the tests of unlearners."""

import numpy as np
import pytest

from defense.contracts import Repair, Trainer
from defense.models.small_cnn import SmallCnn
from defense.recipe import Recipe
from defense.records import Split, Trained
from defense.victim import make_trainer


@pytest.fixture(scope="module")
def trained(split: Split) -> tuple[Trainer, Trained]:
    recipe = Recipe(epochs=10, batch_size=32, learning_rate=0.05)
    trainer = make_trainer(SmallCnn(width=4), recipe, seed=0, stream="law", scratch=None)
    return trainer, trainer.fit(split.train)


def repair_of(trained, split: Split, forget: np.ndarray) -> Repair:
    affected = split.test.where(split.test.labels == 3).where(np.arange(20) < 2)
    train = split.train
    return Repair(trained[1].model, train.where(forget), train.where(~forget), affected)


@pytest.fixture
def repair(trained, split: Split) -> Repair:
    return repair_of(trained, split, split.train.labels == 3)
