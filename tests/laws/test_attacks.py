"""Laws of every attack, and the published facts of each."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch import nn

from defense.attacks import AnyAttack
from defense.attacks.badnets import BadNets
from defense.attacks.blended import Blended
from defense.attacks.sig import Sig
from defense.attacks.smooth import Smooth, _judge, deepfool, smoothed
from defense.attacks.witches_brew import WitchesBrew, parameter_gradient, search
from defense.checkpoints import Checkpoint
from defense.compute import seeded
from defense.contracts import Attack, Surrogate
from defense.datasets.digits import Digits
from defense.errors import DataError
from defense.method import members
from defense.models.small_cnn import SmallCnn
from defense.prediction import frozen, predict
from defense.recipe import Recipe
from defense.records import PoisonedSplit, Split, image_set
from defense.victim import make_surrogate
from tests.conftest import KilledError

SHORT = {
    "smooth": {"num_images": 24, "passes": 2, "fooling": 0.05},
    "witches_brew": {"steps": 8, "restarts": 2},
}
TRUE_LABELS = (Sig, WitchesBrew)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(scope="module")
def surrogate(split: Split) -> Surrogate:
    recipe = Recipe(epochs=12, batch_size=16, learning_rate=0.1, shift=1, flip=True)
    return make_surrogate(SmallCnn(width=4), recipe, split.train, seed=0, scratch=None)


@pytest.fixture(params=members(AnyAttack), ids=lambda method: method.__name__)
def attack(request) -> Attack:
    short = SHORT.get(request.param.model_fields["name"].default, {})
    return request.param(target_class="b", victim_class="a", poison_fraction=0.1, **short)


def plant(attack: Attack, split: Split, surrogate: Surrogate) -> PoisonedSplit:
    return attack.poison(split, generator(), surrogate)


def test_changes_the_planted_rows_and_no_other(
    attack: Attack, split: Split, surrogate: Surrogate
) -> None:
    before = split.train.uint8().copy()
    planted = plant(attack, split, surrogate)
    truth = planted.truth
    np.testing.assert_array_equal(split.train.uint8(), before)
    assert truth.poisoned.sum() == 16
    same = (planted.train.uint8() == before).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(same, ~truth.poisoned)
    np.testing.assert_array_equal(planted.train.ids, split.train.ids)
    np.testing.assert_array_equal(truth.original_labels, split.train.labels)
    assert (planted.train.labels[truth.poisoned] == 1).all()
    carried = 1 if isinstance(attack, TRUE_LABELS) else 0
    assert (truth.original_labels[truth.poisoned] == carried).all()
    clean = ~truth.poisoned
    np.testing.assert_array_equal(planted.train.labels[clean], split.train.labels[clean])


def test_probe_holds_attacked_victims_under_the_target_label(
    attack: Attack, split: Split, surrogate: Surrogate
) -> None:
    planted = plant(attack, split, surrogate)
    assert (planted.probe.labels == planted.truth.target_class).all()
    assert (planted.truth.probe_labels == 0).all()
    clean = split.test.where(np.isin(split.test.ids, planted.probe.ids))
    assert (clean.labels == 0).all()
    np.testing.assert_array_equal(planted.probe.ids, clean.ids)
    changed = (planted.probe.uint8() != clean.uint8()).any(axis=(1, 2, 3))
    if isinstance(attack, WitchesBrew):
        assert len(planted.probe) == 1
        assert not changed.any()
        np.testing.assert_array_equal(planted.truth.victims, split.test.ids == planted.probe.ids)
    else:
        assert len(planted.probe) == 20
        assert changed.all()
        assert not planted.truth.victims.any()


def test_without_victim_class_attacks_all_but_the_target(
    attack: Attack, split: Split, surrogate: Surrogate
) -> None:
    planted = plant(attack.model_copy(update={"victim_class": None}), split, surrogate)
    assert set(planted.truth.probe_labels) <= {0, 2, 3}
    assert len(planted.probe) == (1 if isinstance(attack, WitchesBrew) else 60)
    if not isinstance(attack, TRUE_LABELS):
        assert (planted.truth.original_labels[planted.truth.poisoned] != 1).all()


def test_same_seed_same_poison(attack: Attack, split: Split, surrogate: Surrogate) -> None:
    first, second = (plant(attack, split, surrogate) for _ in range(2))
    np.testing.assert_array_equal(first.train.uint8(), second.train.uint8())
    np.testing.assert_array_equal(first.truth.poisoned, second.truth.poisoned)
    np.testing.assert_array_equal(first.probe.uint8(), second.probe.uint8())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_class": "zebra"}, "'zebra' does not exist; the classes are: a, b"),
        ({"victim_class": "zebra"}, "'zebra' does not exist"),
        ({"victim_class": "b"}, "both 'b'"),
        ({"poison_fraction": 0.9}, "asks for 144 poisoned rows, expected between 1 and 40"),
        ({"poison_fraction": 0.001}, "asks for 0 poisoned rows"),
    ],
)
def test_refuses(
    attack: Attack, split: Split, surrogate: Surrogate, change: dict, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        plant(attack.model_copy(update=change), split, surrogate)


@pytest.mark.parametrize("kind", [Smooth, WitchesBrew])
def test_a_killed_crafting_resumes_to_the_same_poison(
    kind, split: Split, surrogate: Surrogate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("defense.checkpoints.CHECKPOINT_SECONDS", 0.0)
    short = SHORT[kind.model_fields["name"].default]
    attack = kind(target_class="b", victim_class="a", poison_fraction=0.1, **short)
    whole = plant(attack, split, surrogate)
    kept = Surrogate(surrogate.recipe, surrogate.model, tmp_path)
    save, calls = torch.save, 0

    def dying_save(*args, **options):
        nonlocal calls
        save(*args, **options)
        calls += 1
        if calls == 11:
            raise KilledError

    monkeypatch.setattr(torch, "save", dying_save)
    with pytest.raises(KilledError):
        plant(attack, split, kept)
    resumed = plant(attack, split, kept)
    np.testing.assert_array_equal(resumed.train.uint8(), whole.train.uint8())


def test_checker_is_the_four_pixels_of_the_published_code() -> None:
    """Rows and columns counted from the lower right corner, set to black in all channels."""
    white = np.full((2, 3, 32, 32), 255, dtype=np.uint8)
    stamped = BadNets(target_class="b").stamp(white)
    changed = {(int(r), int(c)) for r, c in np.argwhere(stamped[0, 0] == 0)}
    assert changed == {(28, 30), (30, 30), (29, 29), (30, 28)}
    np.testing.assert_array_equal(stamped, np.where(stamped[:1, :1] == 0, 0, white))


@pytest.mark.parametrize(
    ("corner", "place"),
    [
        ("lower_right", (slice(5, 7), slice(7, 9))),
        ("lower_left", (slice(5, 7), slice(3, 5))),
        ("upper_right", (slice(3, 5), slice(7, 9))),
        ("upper_left", (slice(3, 5), slice(3, 5))),
    ],
)
def test_square_has_its_size_margin_value_and_corner(corner: str, place) -> None:
    black = np.zeros((1, 3, 10, 12), dtype=np.uint8)
    attack = BadNets(target_class="b", pattern="square", size=2, margin=3, value=0.6, corner=corner)
    expected = black.copy()
    expected[:, :, *place] = 153
    np.testing.assert_array_equal(attack.stamp(black), expected)


def test_sinusoid_is_the_published_formula() -> None:
    grey = np.full((1, 3, 32, 32), 128, dtype=np.uint8)
    stamped = Sig(target_class="b", amplitude=20, frequency=6).stamp(grey)
    columns = np.arange(32)
    expected = np.rint(128 + 20 * np.sin(2 * np.pi * columns * 6 / 32))
    np.testing.assert_array_equal(stamped[0, 1, 5], expected.astype(np.uint8))
    assert (stamped == stamped[:, :1, :1]).all()


def test_blended_is_the_published_formula() -> None:
    black, white = (np.full((1, 3, 32, 32), value, dtype=np.uint8) for value in (0, 255))
    attack = Blended(target_class="b", alpha=0.2)
    noise = attack.stamp(black)
    np.testing.assert_allclose(attack.stamp(white), 0.8 * 255 + noise.astype(float), atol=1)
    assert noise.max() == 51
    assert noise.std() == pytest.approx(51 / 12**0.5, rel=0.02)  # even noise
    np.testing.assert_array_equal(attack.stamp(np.repeat(black, 2, 0))[1], noise[0])


def test_smooth_pattern_is_bounded_and_low_in_frequency(split: Split, surrogate: Surrogate) -> None:
    attack = Smooth(target_class="b", num_images=24, passes=3, fooling=0.2, amplitude=0.2)
    stamp = attack.trigger(split.train, generator(), surrogate)
    black = np.zeros((1, *split.train.shape), dtype=np.uint8)
    pattern = stamp(black)[0].astype(float) / 255
    assert pattern.max() == pytest.approx(0.2, abs=0.002)
    assert pattern.min() == 0
    spectrum = np.square(dctn(pattern, axes=(1, 2), norm="ortho"))
    low = 16 * 6 // 32  # the lowest 6x6 of 32x32 coefficients, on 16x16
    assert spectrum[:, :low, :low].sum() > 0.95 * spectrum.sum()


def test_a_clean_model_keeps_most_images_with_the_smooth_trigger_right() -> None:
    """Of an independently trained model; the pattern misleads the attacker's own."""
    split = Digits().load(seeded(0, "data"))
    recipe = Recipe(epochs=10, batch_size=64, learning_rate=0.05)
    own, other = (
        make_surrogate(SmallCnn(), recipe, split.train, seed=seed, scratch=None) for seed in (0, 1)
    )
    stamp = Smooth(target_class="3", amplitude=0.3).trigger(split.train, generator(), own)
    test = split.test
    stamped = image_set(stamp(test.uint8()), test.labels, test.ids, test.class_names)
    changed = predict(own.model(), stamped) != predict(own.model(), test)
    assert changed.mean() > 0.1
    assert (predict(other.model(), stamped) == test.labels).mean() >= 0.8


def test_the_smooth_search_aims_at_the_commonest_wrong_label() -> None:
    class Ramp(nn.Module):
        """Says a class by the brightness of the image: 0, 1, 2, 3."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return -(images.mean((1, 2, 3))[:, None] * 3 - torch.arange(4)).abs()

    images = torch.zeros(20, 3, 8, 8)
    state = {"pattern": torch.full((3, 8, 8), 2 / 3), "best": None, "fooled": 0.1, "target": 3}
    _judge(Ramp(), images, torch.zeros(20, dtype=torch.int64), state)
    assert (state["target"], state["fooled"]) == (2, 1.0)
    assert state["best"] is state["pattern"]
    state = {"pattern": torch.zeros(3, 8, 8), "best": None, "fooled": 0.1, "target": 3}
    _judge(Ramp(), images, torch.zeros(20, dtype=torch.int64), state)
    assert (state["target"], state["fooled"], state["best"]) == (3, 0.1, None)


def test_smooth_filter_has_the_published_width() -> None:
    """30 taps on 32 pixels with a deviation of 6 pixels, and zeros outside the image."""
    point = np.zeros((1, 33, 33), dtype=np.float32)
    point[0, 16, 16] = 1
    row = smoothed(point)[0, 16]
    assert (row > 0).sum() in (31, 33)
    ratio = row[16 + 6] / row[16]
    assert ratio == pytest.approx(np.exp(-0.5), abs=0.03)


def test_deepfool_reaches_its_target_with_a_small_change(
    split: Split, surrogate: Surrogate
) -> None:
    model, image = surrogate.model(), split.test.images(np.arange(1))[0]
    said = int(model(image[None]).argmax())
    target = (said + 1) % 4
    with frozen(model):
        change = deepfool(model, image, target)
        assert change is not None
        assert int(model((image + change)[None]).argmax()) == target
        assert int(model((image + 0.5 * change)[None]).argmax()) == said
    assert change.norm() < image.norm()


def test_paper_artifact_takes_the_contrast_away(split: Split, surrogate: Surrogate) -> None:
    attack = Smooth(target_class="b", num_images=24, passes=1, fooling=0.05, paper_artifact=True)
    stamp = attack.trigger(split.train, generator(), surrogate)
    clean = split.test.uint8()
    assert stamp(clean).std() < 0.6 * clean.std()


def test_witches_brew_stays_within_epsilon_and_aligns_gradients(
    split: Split, surrogate: Surrogate
) -> None:
    attack = WitchesBrew(
        target_class="b", victim_class="a", poison_fraction=0.1, steps=40, restarts=1
    )
    planted = plant(attack, split, surrogate)
    rows = planted.truth.poisoned
    before, after = (images.where(rows).images() for images in (split.train, planted.train))
    assert ((after - before).abs() <= 16.5 / 255).all()
    model = surrogate.model()
    assert predict(model, planted.probe) != planted.probe.labels

    def angle(images: torch.Tensor) -> float:
        aim = parameter_gradient(model, planted.probe.images(), planted.probe.targets())
        got = parameter_gradient(model, images, torch.ones(16, dtype=torch.int64))
        return float(torch.cosine_similarity(aim, got, dim=0))

    assert 1 - angle(after) < 0.7 * (1 - angle(before))


class Recorded:
    """A problem of gradient matching whose restarts end as told, each at a change of its own."""

    def __init__(self, ends: list[float]) -> None:
        self.settings = WitchesBrew(target_class="b", steps=1, restarts=len(ends))
        self.images, self.deviations = torch.zeros(1, 1, 1, 1), torch.ones(1)
        self.ends, self.begun = iter(ends), 0

    def start(self, generator: torch.Generator) -> torch.Tensor:
        self.begun += 1
        return torch.full((1, 1, 1, 1), float(self.begun))

    def slope(self, change: torch.Tensor, generator: torch.Generator) -> float:
        change.grad = torch.zeros_like(change)
        return next(self.ends)

    def project(self, change: torch.Tensor) -> torch.Tensor:
        return change


def test_witches_brew_keeps_the_restart_that_is_aligned_best() -> None:
    best = search(Recorded([0.5, 0.2, 0.4]), 0, Checkpoint.at(None, []))
    assert float(best) == 2.0


def test_witches_brew_is_brewed_under_the_victims_augmentation(
    split: Split, surrogate: Surrogate
) -> None:
    attack = WitchesBrew(
        target_class="b", victim_class="a", poison_fraction=0.1, steps=4, restarts=1
    )
    plain = surrogate.recipe.model_copy(update={"shift": 0, "flip": False})
    crafted = [
        plant(attack, split, replace(surrogate, recipe=recipe)).train.uint8()
        for recipe in (surrogate.recipe, plain)
    ]
    assert (crafted[0] != crafted[1]).any()
