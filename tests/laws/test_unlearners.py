"""Laws of every unlearner."""

import numpy as np
import pytest
import torch

from defense.contracts import Unlearner
from defense.method import members
from defense.models.small_cnn import SmallCnn
from defense.recipe import Recipe
from defense.records import Split
from defense.unlearning import AnyUnlearner
from defense.victim import make_trainer


@pytest.fixture(params=members(AnyUnlearner), ids=lambda method: method.__name__)
def unlearner(request) -> Unlearner:
    return request.param()


@pytest.fixture(scope="module")
def trained(split: Split):
    recipe = Recipe(epochs=10, batch_size=32, learning_rate=0.05)
    trainer = make_trainer(SmallCnn(width=4), recipe, seed=0, stream="law", scratch=None)
    return trainer, trainer.fit(split.train)


def run(unlearner: Unlearner, trained, split: Split):
    trainer, suspect = trained
    forget = split.train.labels == 3
    model = suspect.model
    return unlearner.unlearn(model, split.train.where(forget), split.train.where(~forget), trainer)


def test_leaves_the_suspect_model_alone(unlearner: Unlearner, trained, split: Split) -> None:
    before = {name: value.clone() for name, value in trained[1].model.state_dict().items()}
    done = run(unlearner, trained, split)
    after = trained[1].model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    new = done.model.state_dict()
    assert any(not torch.equal(before[name], new[name]) for name in before)
    assert all(value.isfinite().all() for value in new.values())


def test_costs_what_it_says_and_no_more_than_retraining(
    unlearner: Unlearner, trained, split: Split
) -> None:
    done = run(unlearner, trained, split)
    retain, epochs = int((split.train.labels != 3).sum()), trained[0].recipe.epochs
    assert 0 < done.gradient_samples <= retain * epochs
    known = {"eu": epochs, "cf": round(0.2 * epochs)}
    if unlearner.name in known:
        assert done.gradient_samples == retain * known[unlearner.name]


def test_does_not_train_on_what_is_to_be_forgotten(
    unlearner: Unlearner, trained, split: Split
) -> None:
    """A forget set full of wrong labels must not move the result."""
    forget = split.train.labels == 3
    honest = run(unlearner, trained, split)
    wrong = split.train.where(forget)
    wrong = type(wrong)(
        wrong.pixels, np.zeros_like(wrong.labels), wrong.ids, wrong.class_names, wrong.rows
    )
    trainer, suspect = trained
    other = unlearner.unlearn(suspect.model, wrong, split.train.where(~forget), trainer)
    pairs = zip(honest.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
