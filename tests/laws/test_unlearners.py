"""Laws of every unlearner."""

import numpy as np
import pytest
import torch
from torch import nn

from defense.contracts import Repair, Unlearner
from defense.method import members
from defense.prediction import predict
from defense.records import Split
from defense.training import Stepper
from defense.unlearning import AnyUnlearner, potion, ssd
from defense.unlearning.dampening import batch_importance, sample_importance
from tests.laws.conftest import repair_of

SHORT = {"scrub_cmu": {"steps": 20, "ascent_steps": 4}}


@pytest.fixture(params=members(AnyUnlearner), ids=lambda method: method.__name__)
def unlearner(request) -> Unlearner:
    return request.param(**SHORT.get(request.param.model_fields["name"].default, {}))


def test_leaves_the_suspect_model_and_its_rows_alone(
    unlearner: Unlearner, trained, repair: Repair
) -> None:
    parts = repair.forget, repair.retain, repair.affected
    rows = [(part.uint8().copy(), part.labels.copy()) for part in parts]
    before = {name: value.clone() for name, value in repair.model.state_dict().items()}
    done = unlearner.unlearn(repair, trained[0])
    after = repair.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    new = done.model.state_dict()
    assert any(not torch.equal(before[name], new[name]) for name in before)
    assert all(value.isfinite().all() for value in new.values())
    assert not done.model.training
    assert all(parameter.requires_grad for parameter in repair.model.parameters())
    for part, (pixels, labels) in zip(parts, rows, strict=True):
        np.testing.assert_array_equal(part.uint8(), pixels)
        np.testing.assert_array_equal(part.labels, labels)


def test_repeats_itself(unlearner: Unlearner, trained, repair: Repair) -> None:
    first, second = (unlearner.unlearn(repair, trained[0]).model for _ in range(2))
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def differentiated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that gradients are taken of, noted as they are taken."""
    counts: list[int] = []
    step = Stepper.step

    def noted(self, phase, batch, rows, rate):
        counts.append(len(batch))
        return step(self, phase, batch, rows, rate)

    def counting(importance):
        def counted(model, images, *args, **options):
            counts.append(len(images))
            return importance(model, images, *args, **options)

        return counted

    monkeypatch.setattr(Stepper, "step", noted)
    for module in (ssd, potion):
        monkeypatch.setattr(module, "batch_importance", counting(batch_importance))
    monkeypatch.setattr(ssd, "sample_importance", counting(sample_importance))
    return counts


def test_keeps_to_its_declared_budget(
    unlearner: Unlearner, trained, repair: Repair, differentiated: list[int]
) -> None:
    trainer = trained[0]
    done = unlearner.unlearn(repair, trainer)
    assert sum(differentiated) == done.gradient_samples
    forget, retain = len(repair.forget), len(repair.retain)
    declared = unlearner.max_gradient_samples(forget, retain, trainer.recipe)
    assert 0 < done.gradient_samples <= declared
    known = {
        "eu": 10 * retain,
        "cf": 4 * retain,
        "ssd": 2 * forget + retain - round(0.1 * retain),
        "scrub": 3 * retain + 2 * forget,
        "scrub_cmu": 18 * retain + 2 * forget,  # an epoch is one step here
        "badt": forget + round(0.3 * retain),
        "potion": forget + retain,
    }
    assert done.gradient_samples == known[unlearner.name]


def test_an_empty_forget_set_changes_nothing(unlearner: Unlearner, trained, split: Split) -> None:
    nothing = repair_of(trained, split, np.zeros(len(split.train), dtype=bool))
    done = unlearner.unlearn(nothing, trained[0])
    assert done.gradient_samples == 0
    pairs = zip(done.model.parameters(), nothing.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_one_flagged_row_is_enough(unlearner: Unlearner, trained, split: Split) -> None:
    one = repair_of(trained, split, np.arange(len(split.train)) == 7)
    done = unlearner.unlearn(one, trained[0])
    assert all(value.isfinite().all() for value in done.model.state_dict().values())


def test_methods_that_use_the_forget_set_lower_its_labels(
    unlearner: Unlearner, trained, repair: Repair
) -> None:
    """With a rate that suits ten steps, the share of kept labels falls on the forget set."""
    faster = {
        "scrub": {"learning_rate": 0.02},
        "scrub_cmu": {"learning_rate": 0.05},
        "badt": {"learning_rate": 0.02, "epochs": 4},
        "cf": {"budget": 1.0},
    }
    method = unlearner.model_copy(update=faster.get(unlearner.name, {}))
    done = method.unlearn(repair, trained[0])

    def kept(model: nn.Module) -> float:
        return float((predict(model, repair.forget) == repair.forget.labels).mean())

    assert kept(done.model) < kept(repair.model) - 0.5
