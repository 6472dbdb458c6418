"""Confirmation: the wrong prediction dies with planted rows, and not with others."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from defense.attacks.badnets import BadNets
from defense.compute import seeded
from defense.confirmation import ConfirmSettings, confirm
from defense.contracts import Trainer
from defense.datasets.digits import Digits
from defense.evidence import Confirmation
from defense.models.small_cnn import SmallCnn
from defense.phases import Phase
from defense.prediction import predict
from defense.recipe import Recipe
from defense.records import Flags, ImageSet, Mask, Trained
from defense.victim import make_trainer

SETTINGS = ConfirmSettings(points=3)


@pytest.fixture(scope="module")
def drill() -> tuple[torch.nn.Module, ImageSet, Mask, ImageSet, Trainer]:
    """A backdoored model of the digits, with three inputs that the trigger fools."""
    split = Digits(train_size=1000).load(seeded(0, "data"))
    attack = BadNets(
        pattern="square", size=2, margin=0, value=1.0,
        victim_class="8", target_class="3", poison_fraction=0.04,
    )  # fmt: skip
    poisoned = attack.poison(split, seeded(0, "attack"), None)
    recipe = Recipe(epochs=10, batch_size=64, learning_rate=0.05)
    trainer = make_trainer(SmallCnn(), recipe, seed=0, stream="suspect", scratch=None)
    model, probe = trainer.fit(poisoned.train).model, poisoned.probe
    fooled = np.flatnonzero(predict(model, probe) == probe.labels)[:3]
    return model, poisoned.train, poisoned.truth.poisoned, probe.take(fooled), trainer


def flags_of(train: ImageSet, mask: Mask, label: int) -> Flags:
    everything = np.ones(len(train), dtype=np.bool_)
    return Flags(mask.astype(np.float32), 0.5, everything, train.labels == label)


def confirmed(drill, mask: Mask) -> Confirmation:
    model, train, _, affected, trainer = drill
    flags = flags_of(train, mask, affected.labels[0])
    return confirm(model, train, flags, affected, trainer, SETTINGS)


def test_the_wrong_prediction_dies_with_planted_rows_only(drill) -> None:
    model, _, planted, _, _ = drill
    weights = copy.deepcopy(model.state_dict())
    found = confirmed(drill, planted)
    assert [rows for rows, _, _ in found.points] == [10, 20, 40]
    rows, own, others = found.points[-1]
    assert found.before > 0.9
    assert own < 0.25 < 0.6 < others
    assert found.cut is not None
    assert found.cut <= rows
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_rows_that_did_not_cause_it_do_not_end_it(drill) -> None:
    _, train, planted, affected, _ = drill
    clean = np.flatnonzero((train.labels == affected.labels[0]) & ~planted)[:40]
    mask = np.zeros(len(train), dtype=np.bool_)
    mask[clean] = True
    assert confirmed(drill, mask).cut is None


def test_without_flags_nothing_is_tried(drill) -> None:
    found = confirmed(drill, np.zeros(len(drill[1]), dtype=np.bool_))
    assert (found.points, found.cut) == ((), None)


def test_no_others_no_comparison(drill) -> None:
    _, train, planted, affected, _ = drill
    mask = (train.labels == affected.labels[0]) | planted
    assert confirmed(drill, mask).points[-1][2] is None


@pytest.mark.parametrize(
    ("flagged", "cut"),
    [((0.9, 0.4, 0.1), 20), ((0.1, 0.2, 0.1), 10), ((0.1, 0.6, 0.2), 40), ((0.1, 0.2, 0.7), None)],
)
def test_the_cut_is_where_it_dies_for_good(flagged: tuple[float, ...], cut: int | None) -> None:
    points = tuple((rows, own, 1.0) for rows, own in zip((10, 20, 40), flagged, strict=True))
    assert Confirmation(1.0, points).cut == cut
    assert Confirmation(0.4, points).cut is None  # dead before
    others = tuple((rows, own, 0.1) for rows, own, _ in points)
    assert Confirmation(1.0, others).cut is None  # as with other rows
    assert Confirmation(1.0, others).spoilt
    assert not Confirmation(1.0, points).spoilt
    assert not Confirmation(0.4, others).spoilt
    assert not Confirmation(1.0, ()).spoilt


def test_the_most_suspicious_rows_are_unlearnt_first(drill) -> None:
    model, train, planted, affected, trainer = drill
    clean = np.flatnonzero((train.labels == affected.labels[0]) & ~planted)[:40]
    suspicion = planted.astype(np.float32)
    suspicion[clean] = 0.8
    flags = replace(flags_of(train, planted, affected.labels[0]), suspicion=suspicion)
    settings = ConfirmSettings(points=2)
    first, last = confirm(model, train, flags, affected, trainer, settings).points
    assert (first[0], last[0]) == (40, 80)
    assert first[1] < 0.25


def test_what_is_trained_on_and_how(drill) -> None:
    """A few draws of more flagged rows than that, and other rows in random order."""
    model, train, planted, affected, trainer = drill
    phases, recipes = [], []

    def tune(given: torch.nn.Module, parts: list[Phase], recipe: Recipe) -> Trained:
        phases.extend(parts)
        recipes.append(recipe)
        return Trained(given, 0)

    settings = ConfirmSettings(points=1, retain=100, forget=8, learning_rate=0.03)
    flags = flags_of(train, planted, affected.labels[0])
    adam = trainer.recipe.model_copy(update={"optimizer": "adam"})
    confirm(model, train, flags, affected, replace(trainer, tune=tune, recipe=adam), settings)
    assert [len(phase.images) for phase in phases] == [100 + 40 + 40] * 2
    assert {recipe.optimizer for recipe in recipes} == {"sgd"}  # the rate is one of its own
    own, others = (phase.images for phase in phases)
    rest, alike, forgotten = np.split(own.ids, [100, 140])
    assert {*forgotten} == {*train.ids[planted]}
    assert not {*rest, *alike} & {*forgotten}
    assert {*own.labels[100:140]} == {*train.labels[planted]}
    assert {*rest} != {*train.ids[~planted][:100]}
    assert {*others.labels[140:]} == {affected.labels[0]}
    assert not {*others.ids[140:]} & {*train.ids[planted]}
    assert {(recipe.learning_rate, recipe.schedule) for recipe in recipes} == {(0.03, "constant")}
    settings = ConfirmSettings(points=1, retain=100, forget=90)
    phases.clear()
    confirm(model, train, flags, affected, replace(trainer, tune=tune), settings)
    assert len(phases[0].images) == 100 + 90 + 90
