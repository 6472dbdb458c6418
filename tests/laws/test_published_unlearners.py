"""The published facts of each unlearner, and of what it is made of."""

import copy
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defense.contracts import Repair
from defense.errors import DataError, NumericalError
from defense.prediction import predict
from defense.recipe import Recipe
from defense.records import Split, Trained
from defense.training import Stepper, all_but_last
from defense.unlearning import potion
from defense.unlearning.bad_teacher import BadTeacher
from defense.unlearning.dampening import batch_importance, dampened, sample_importance
from defense.unlearning.distillation import divergence
from defense.unlearning.fine_tuning import CatastrophicForgetting
from defense.unlearning.potion import Potion
from defense.unlearning.retraining import ExactUnlearning
from defense.unlearning.scrub import CorrectiveScrub, Distilled, Scrub
from defense.unlearning.ssd import SelectiveSynapticDampening, margins

WITHOUT_FORGET = (ExactUnlearning, CatastrophicForgetting)


@pytest.mark.parametrize("kind", WITHOUT_FORGET)
def test_training_on_the_rest_does_not_see_the_forget_set(kind, trained, repair: Repair) -> None:
    """A forget set full of wrong labels must not move the result."""
    honest = kind().unlearn(repair, trained[0])
    wrong = replace(repair.forget, labels=np.zeros_like(repair.forget.labels))
    other = kind().unlearn(replace(repair, forget=wrong), trained[0])
    pairs = zip(honest.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("given", "rate"), [(None, 0.15), (0.03, 0.03)])
def test_fine_tuning_takes_three_times_the_rate_unless_told(
    given: float | None, rate: float, trained, repair: Repair
) -> None:
    seen = list[Recipe]()

    def tune(model: nn.Module, phases: object, recipe: Recipe, **_: object) -> Trained:
        seen.append(recipe)
        return Trained(model, 0)

    trainer = SimpleNamespace(recipe=trained[0].recipe, tune=tune)
    CatastrophicForgetting(learning_rate=given).remove(repair, trainer)
    assert seen[0].learning_rate == pytest.approx(rate)
    assert seen[0].epochs == 4


def test_last_layers_train_alone(trained, repair: Repair) -> None:
    done = CatastrophicForgetting(last_layers=1).unlearn(repair, trained[0])
    before, after = repair.model.state_dict(), done.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"network.6.weight", "network.6.bias"}
    with pytest.raises(DataError, match="at least 9 layers, got one of 4"):
        all_but_last(repair.model, 9)


def test_importances_are_squared_gradients(trained, split: Split) -> None:
    model, images = trained[1].model, split.train.where(np.arange(160) < 12)
    rows = [
        torch.autograd.grad(
            F.cross_entropy(model(images.images(np.array([row]))), images.targets(np.array([row]))),
            list(model.parameters()),
        )
        for row in range(12)
    ]
    by_sample = sample_importance(model, images, label="test")
    by_batch = batch_importance(model, images, F.cross_entropy, 2, batch_size=6, label="test")
    for number, name in enumerate(by_sample):
        gradients = torch.stack([row[number] for row in rows])
        torch.testing.assert_close(
            by_sample[name], gradients.square().mean(0), rtol=1e-3, atol=1e-7
        )
        halves = torch.stack([gradients[:6].mean(0), gradients[6:].mean(0)])
        torch.testing.assert_close(by_batch[name], halves.square().mean(0), rtol=1e-3, atol=1e-7)


def test_dampening_is_the_published_rule() -> None:
    model = nn.Linear(4, 1, bias=False)
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    with torch.no_grad():
        model.weight.copy_(weight)
    forget, everything = torch.tensor([[0.0, 1.0, 4.0, 20.0]]), torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    done = dampened(model, {"weight": forget}, {"weight": everything}, 3.0, 5.0)
    torch.testing.assert_close(done.weight, torch.tensor([[1.0, 2.0, 3.0, 1.0]]))
    torch.testing.assert_close(model.weight, weight)


def test_ssd_chooses_what_mends_the_affected_inputs(trained, repair: Repair) -> None:
    """Of a setting that does nothing and one that mends, the second is used."""
    assert (margins(repair.model, repair.affected) > 0).all()
    unlearner = SelectiveSynapticDampening(alphas=(1.1, 1e9), strengths=(0.01,))
    done = unlearner.unlearn(repair, trained[0])
    assert (margins(done.model, repair.affected) < 0).all()
    assert done.chosen == {"alpha": 1.1, "strength": 0.01}


def test_ssd_refuses_weights_that_are_not_finite(trained, repair: Repair) -> None:
    """No setting mends them, and the first of the grid is no answer."""
    broken = copy.deepcopy(repair.model)
    next(broken.parameters()).data[0] = torch.inf
    with pytest.raises(NumericalError, match="a setting that leaves finite weights"):
        SelectiveSynapticDampening().unlearn(replace(repair, model=broken), trained[0])


def test_ssd_keeps_the_setting_that_keeps_most_right(trained, repair: Repair) -> None:
    """Of two that mend the affected inputs the one counts that knows the held-out rows."""
    method, spared = SelectiveSynapticDampening(), repair.retain

    class Constant(nn.Module):
        def __init__(self, label: int) -> None:
            super().__init__()
            self.said = nn.Parameter(F.one_hot(torch.tensor(label), 4).float())

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.said.expand(len(images), 4)

    held = spared.where(spared.labels == 1)
    right, wrong, blind = (Constant(label) for label in (1, 2, 3))  # affected are taken for a 3
    ranks = [method._judge(model, repair.affected, held) for model in (right, wrong, blind)]
    assert ranks == sorted(ranks, reverse=True)
    assert [mended for mended, _ in ranks] == [True, True, False]


def test_potion_refuses_a_model_whose_weights_do_not_matter(trained, repair: Repair) -> None:
    dead = copy.deepcopy(repair.model)
    with torch.no_grad():
        for weight in dead.parameters():
            weight.zero_()
    with pytest.raises(NumericalError, match="train it again"):
        Potion().unlearn(replace(repair, model=dead), trained[0])


def test_divergence_is_zero_for_equal_answers_and_scales_with_temperature() -> None:
    logits = torch.randn(5, 4)
    assert float(divergence(logits, logits, 4.0)) == pytest.approx(0, abs=1e-6)
    other = torch.randn(5, 4)
    target = (other / 4).softmax(1)
    expected = 16 * (target * (target.log() - (logits / 4).log_softmax(1))).sum(1).mean()
    assert float(divergence(logits, other, 4.0)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("wrong", "apart"), [(0.0, -1.0), (0.99, 0.001), (-1.0, -0.001)])
def test_scrub_weighs_cross_entropy_and_divergence(trained, split: Split, wrong, apart) -> None:
    model, images = trained[1].model, split.train.where(np.arange(160) < 8)
    rows = np.array([3, 1, 4])
    other = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    loss = Distilled(images, other, wrong, apart)(model, images.images(rows), rows)
    said, wanted = model(images.images(rows)), other(images.images(rows))
    expected = wrong * F.cross_entropy(said, images.targets(rows))
    expected = expected + apart * divergence(said, wanted, 4.0)
    torch.testing.assert_close(loss, expected)


def test_scrub_ascends_before_it_descends(trained, repair: Repair) -> None:
    steps: list[str] = []
    step = Stepper.step

    def noted(self, phase, batch, rows, rate):
        up = phase.images is repair.forget
        steps.append("up" if up else "down")
        return step(self, phase, batch, rows, rate)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stepper, "step", noted)
        Scrub().unlearn(repair, trained[0])
    assert [kind for kind, _ in itertools.groupby(steps)] == ["up", "down", "up", "down"]


def test_the_benchmarks_scrub_takes_turns_until_its_ascent_is_done() -> None:
    method = CorrectiveScrub(steps=11, ascent_steps=4, batch_size=10)
    up, down = (True, 10), (False, 20)
    assert method.turns(num_forget=10, num_retain=20) == [up, down, up, *[down] * 3, (False, 10)]
    assert method.turns(num_forget=1, num_retain=20) == [down] * 5 + [(False, 10)]
    assert method.turns(num_forget=10, num_retain=1000) == [up, (False, 100)]
    assert method.turns(num_forget=1000, num_retain=20) == [(True, 100), (False, 10)]
    assert method.turns(num_forget=10, num_retain=0) == []


@pytest.mark.parametrize("steps", [1, 2, 5, 41])
@pytest.mark.parametrize("num_forget", [2, 300, 5000])
def test_the_benchmarks_scrub_never_ends_with_an_ascent(steps: int, num_forget: int) -> None:
    method = CorrectiveScrub(steps=steps, ascent_steps=400)
    turns = method.turns(num_forget, 9694)
    assert not turns[-1][0]
    assert sum(-(-rows // method.batch_size) for _, rows in turns) == steps
    assert turns[0][0] == (steps > 1)


def test_the_benchmarks_scrub_breaks_off_after_its_steps(trained, repair: Repair) -> None:
    """Its rates are those of the source's schedule, which would end a quarter later."""
    rates: list[float] = []
    step = Stepper.step

    def noted(self, phase, batch, rows, rate):
        rates.append(rate)
        return step(self, phase, batch, rows, rate)

    method = CorrectiveScrub(
        steps=8, ascent_steps=1, batch_size=32, warmup=0.25, learning_rate=0.01
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stepper, "step", noted)
        done = method.unlearn(repair, trained[0])
    falling = [0.01 * (1 - (number - 2) / (1.25 * 8)) for number in range(2, 8)]
    assert rates[2:] == pytest.approx(falling)
    turns = method.turns(len(repair.forget), len(repair.retain))
    assert done.gradient_samples == sum(rows for _, rows in turns)


def test_bad_teacher_imitates_chance_on_flagged_rows_alone(trained, repair: Repair) -> None:
    """After many epochs flagged rows get the untrained model's answers, others keep theirs."""
    method = BadTeacher(epochs=40, learning_rate=0.01, retain_share=1.0, batch_size=64)
    done = method.unlearn(repair, trained[0]).model
    fresh = trained[0].fresh(repair.retain)
    wanted = fresh(repair.forget.images()).softmax(1)
    before = (repair.model(repair.forget.images()).softmax(1) - wanted).abs().mean()
    after = (done(repair.forget.images()).softmax(1) - wanted).abs().mean()
    assert after < 0.2 * before
    assert (predict(done, repair.retain) == repair.retain.labels).mean() > 0.9


def test_potion_stops_at_the_first_share_that_forgets(trained, repair: Repair) -> None:
    done = Potion(forget_accuracy=0.5).unlearn(repair, trained[0]).model
    further = Potion(forget_accuracy=0.0).unlearn(repair, trained[0]).model

    def kept(model: nn.Module) -> float:
        return float((predict(model, repair.forget) == repair.forget.labels).mean())

    def changed(model: nn.Module) -> int:
        pairs = zip(model.parameters(), repair.model.parameters(), strict=True)
        return sum(int((a != b).sum()) for a, b in pairs)

    assert kept(further) == 0
    assert kept(done) <= 0.5 * kept(repair.model)
    assert changed(done) <= changed(further)


def test_potion_is_the_published_rule(trained, repair: Repair) -> None:
    """Importance is the absolute slope of the logits' length; the share grows by a tenth."""
    model, seen = repair.model, []
    repair = replace(repair, forget=repair.forget.where(np.arange(40) < 32))

    def noted(model, ours, rest, alpha, strength):
        seen.append((ours, rest, alpha, strength))
        return dampened(model, ours, rest, alpha, strength)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(potion, "dampened", noted)
        done = Potion(batch_size=32, forget_accuracy=0.0).unlearn(repair, trained[0])
    ours, rest, _, strength = seen[0]
    assert strength == 1
    length = model(repair.forget.images()).norm(dim=1).mean()
    slopes = torch.autograd.grad(length, list(model.parameters()))
    for name, slope in zip(ours, slopes, strict=True):
        torch.testing.assert_close(ours[name], slope.abs(), rtol=1e-4, atol=1e-6)
    ratios = torch.cat([(ours[name] / rest[name]).flatten() for name in ours])
    ratios = ratios[ratios.isfinite()].sort(descending=True).values
    share = len(repair.forget) / (25 * (len(repair.forget) + len(repair.retain)))
    off = [np.log(1 + 100 * share * 1.1**number) / 100 for number in range(len(seen))]
    wanted = [float(ratios[int(len(ratios) * part)]) for part in off]
    assert [alpha for *_, alpha, _ in seen] == wanted
    forgotten = {"alpha": wanted[-1], "weights": pytest.approx(off[-1]), "forget_accuracy": 0.0}
    assert done.chosen == forgotten
    assert len(seen) > 1
