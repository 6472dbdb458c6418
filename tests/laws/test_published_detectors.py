"""The published facts of each detector, and of what it is made of."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn

from defense.attacks.badnets import BadNets
from defense.contracts import Surrogate
from defense.detectors import poison_forensics
from defense.detectors.activation_clustering import ActivationClustering
from defense.detectors.corruptions import CORRUPTIONS
from defense.detectors.delta_influence import DeltaInfluence
from defense.detectors.frequency import FrequencyDetector, Spectrum
from defense.detectors.influence_threshold import InfluenceThreshold
from defense.detectors.poison_forensics import (
    Inquiry,
    PoisonForensics,
    Unlearning,
    even_gradients,
)
from defense.detectors.spectral_signatures import SpectralSignatures
from defense.errors import DataError
from defense.models.small_cnn import SmallCnn
from defense.recipe import Recipe
from defense.records import Case, ImageSet, Queries, Split
from defense.victim import make_trainer
from tests.conftest import make_images
from tests.laws.cases import ROWS, detect, make_case, planted_rows


@pytest.mark.parametrize("tau", [0.0, -1.0, -100.0])
@pytest.mark.parametrize("tolerance", [0, 1, 3])
@pytest.mark.parametrize(("change", "number"), [("both", 1), ("image", 2), ("label", 3)])
def test_delta_influence_is_the_published_count_rule(
    tau: float, tolerance: int, change: str, number: int
) -> None:
    case = make_case()
    delta = case.scores[case.queries.change.numpy() == number] - case.scores[0]
    counted = (delta < tau).sum(0) >= len(delta) - tolerance
    flags = detect(DeltaInfluence(tau=tau, tolerance=tolerance, change=change), case)
    np.testing.assert_array_equal(flags.mask, counted)


def test_several_affected_inputs_intersect() -> None:
    case = make_case(affected=3)
    case.scores[case.queries.affected.numpy() == 2] = 0  # the third implicates no row
    planted = case.scores[0] > 50
    for detector in (
        DeltaInfluence(tau=-10),
        InfluenceThreshold(threshold=50, several="boosted"),
    ):
        assert detect(detector, case).mask.sum() == 0
        for change in ({"affected_tolerance": 1}, {"affected": 2}):
            flags = detect(detector.model_copy(update=change), case)
            np.testing.assert_array_equal(flags.mask, planted)
    with pytest.raises(DataError, match="affected_tolerance is 3, expected less than"):
        detect(DeltaInfluence(affected_tolerance=3), case)
    with pytest.raises(DataError, match="affected is 4, but only 3"):
        detect(DeltaInfluence(affected=4), case)


def test_plain_influence_averages_affected_inputs() -> None:
    case = make_case(affected=3)
    own = case.scores[case.queries.changed("none")]
    flags = detect(InfluenceThreshold(), case)
    np.testing.assert_allclose(flags.suspicion, own.mean(0), rtol=1e-6)


def test_delta_influence_refuses_a_tolerance_that_flags_everything() -> None:
    with pytest.raises(DataError, match="expected less than the number of transforms"):
        detect(DeltaInfluence(tolerance=9), make_case(transforms=9))


@pytest.mark.parametrize("rule", ["smaller", "relative_size", "silhouette", "distance"])
@pytest.mark.parametrize("reducer", ["pca", "ica"])
def test_activation_clustering_recovers_a_second_blob(rule: str, reducer: str) -> None:
    """Classes b has a blob of a tenth near class a; the others have one blob each."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(2), 200)
    means = np.zeros((400, 8))
    means[labels == 1, 0] = 10
    blob = np.arange(400) >= 380
    means[blob, 0], means[blob, 1] = 1, 6
    case = feature_case(means + rng.normal(size=means.shape) * 0.5, labels)
    flags = detect(ActivationClustering(rule=rule, reducer=reducer), case)
    second = case.train.labels == 1
    assert (flags.mask[second] == blob[second]).mean() > 0.99
    if rule == "silhouette":
        assert not flags.mask[~second].any()


@pytest.mark.parametrize("reducer", ["pca", "ica"])
def test_activation_clustering_leaves_a_class_alone_whose_rows_look_the_same(reducer: str) -> None:
    seen, labels = np.random.default_rng(0).normal(size=(60, 8)), np.repeat(np.arange(2), 30)
    seen[labels == 0] = 1
    flags = detect(ActivationClustering(reducer=reducer), feature_case(seen, labels))
    assert not flags.mask[labels == 0].any()


def feature_case(seen: np.ndarray, labels: np.ndarray) -> Case:
    """A case whose penultimate activations are given: grey levels through one linear layer."""
    scaled = np.rint(128 + 8 * seen).clip(0, 255).astype(np.uint8)
    ids = np.array([f"{number:04d}" for number in range(len(labels))])
    pixels = scaled.reshape(len(labels), 1, 1, -1)
    train = ImageSet(pixels, labels.astype(np.int64), ids, ("a", "b"), np.arange(len(labels)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(seen.shape[1], 2))
    none = torch.zeros(1, dtype=torch.int64)
    queries = Queries(train.images(np.arange(1)), none + 1, none, none)
    return Case(train, model, queries, np.zeros((1, len(labels)), dtype=np.float32))


def test_spectral_signatures_recover_a_planted_direction() -> None:
    rng = np.random.default_rng(0)
    seen, labels = rng.normal(size=(400, 8)), np.repeat(np.arange(2), 200)
    planted = np.arange(400) >= 380
    seen[planted] += 6 * np.eye(8)[2]
    case = feature_case(seen, labels)
    flags = detect(SpectralSignatures(expected_fraction=0.1), case)
    assert flags.mask[planted].all()
    assert flags.mask[labels == 1].sum() == flags.mask[labels == 0].sum() == 30
    ours = case.train.images().flatten(1).numpy()[labels == 1]
    ours = ours - ours.mean(0)
    leading = np.linalg.svd(ours)[2][0]
    squares = np.square(ours @ leading)
    ratio = flags.suspicion[labels == 1] / squares
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)


def test_spectral_signatures_of_the_paper_are_lengths_along_kept_directions() -> None:
    rng = np.random.default_rng(0)
    case = feature_case(rng.normal(size=(60, 8)) * np.arange(1, 9), np.arange(60) % 2)
    seen = case.train.images().flatten(1).numpy()
    left, values, _ = np.linalg.svd(seen, full_matrices=False)
    cut, length = (values[2] + values[3]) / 2, 0.7  # between two, so that rounding is no matter
    lengths = np.linalg.norm(left[:, :3] * values[:3], axis=1)
    flags = detect(
        SpectralSignatures(
            variant="paper", spectral_threshold=float(cut), contribution_threshold=length
        ),
        case,
    )
    np.testing.assert_allclose(flags.suspicion, lengths, rtol=1e-4)
    np.testing.assert_array_equal(flags.mask, lengths > length)

    flags = detect(SpectralSignatures(variant="paper", spectral_threshold=0, share=0.2), case)
    assert flags.mask.sum() == 12


def test_a_share_of_the_rows_is_flagged_whatever_the_units() -> None:
    case = make_case()
    share = InfluenceThreshold(share=0.25)
    flags = detect(share, case)
    assert flags.mask.sum() == 12
    scaled = detect(share, replace(case, scores=1e6 * case.scores))
    np.testing.assert_array_equal(scaled.suspicion, flags.suspicion)
    several = make_case(affected=5)
    mean = several.scores[several.queries.changed("none")].mean(0)
    together = detect(share, several)
    np.testing.assert_array_equal(np.flatnonzero(together.mask), np.sort(np.argsort(-mean)[:12]))
    boosted = detect(InfluenceThreshold(share=0.25, several="boosted"), several)
    assert boosted.mask[planted_rows(several.train)].all()
    assert boosted.mask.sum() < 12


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda way: way.__name__)
def test_corruptions_change_copies(corruption) -> None:
    images = make_images(12, seed=1, shape=(3, 32, 32)).uint8()
    before = images.copy()
    changed = corruption(images, np.random.default_rng(0))
    np.testing.assert_array_equal(images, before)
    assert changed.shape == images.shape
    assert changed.dtype == np.uint8
    assert (changed != images).any(axis=(1, 2, 3)).sum() >= 11


def test_spectrum_keeps_energy_and_finds_the_mean() -> None:
    images = torch.rand(5, 3, 8, 6)
    coefficients = Spectrum((3, 8, 6))(images)
    torch.testing.assert_close(coefficients.square().sum((1, 2, 3)), images.square().sum((1, 2, 3)))
    torch.testing.assert_close(coefficients[:, :, 0, 0], images.sum((2, 3)) / 48**0.5)


def test_frequency_detector_tells_corrupted_copies_best_if_it_learns_from_clean_images() -> None:
    """Held-out clean images against held-out corrupted ones, after a short training."""
    train = make_images(400, seed=1)
    case = make_case()
    examples = FrequencyDetector().examples(make_images(200, seed=2), torch.Generator())
    mixed = ImageSet(
        np.concatenate([train.uint8(), examples.uint8()]),
        np.zeros(800, dtype=np.int64),
        np.array([f"{number:04d}" for number in range(800)]),
        train.class_names,
        np.arange(800),
    )
    scores = np.zeros((len(case.queries.labels), 800), dtype=np.float32)
    case = replace(case, train=mixed, scores=scores, controls=make_images(800, seed=3))
    precision = {}
    for clean in ("test", "train"):
        detector = FrequencyDetector(clean=clean, epochs=6, batch_size=32, learning_rate=1.0)
        suspicion = detect(detector, case).suspicion
        assert suspicion[600:].mean() - suspicion[400:600].mean() > 1
        precision[clean] = average_precision_score(np.arange(800) >= 600, suspicion)
    assert precision["test"] > precision["train"]


def test_frequency_detector_needs_clean_images() -> None:
    case = replace(make_case(), controls=None)
    with pytest.raises(DataError, match="expected clean test images, got none"):
        detect(FrequencyDetector(), case)
    assert len(detect(FrequencyDetector(clean="train", epochs=1), case).mask) == ROWS


def test_even_gradients_are_those_of_the_last_layer() -> None:
    case = make_case()
    rows = even_gradients(case, torch.Generator().manual_seed(0))
    said = case.model(case.train.images(np.arange(1)))
    loss = -said.log_softmax(1).mean()
    (gradient,) = torch.autograd.grad(loss, case.model.linear.weight)
    drawn = torch.arange(768)
    expected = nn.functional.normalize(gradient.flatten()[drawn], dim=0)
    np.testing.assert_allclose(rows[0], expected, atol=1e-5)


def test_even_gradients_of_many_rows_keep_fewer_coordinates(monkeypatch) -> None:
    """Of so many that all rows would take more than is allowed, some are drawn."""
    case, everything = make_case(), torch.Generator().manual_seed(0)
    whole = even_gradients(case, everything)
    monkeypatch.setattr(poison_forensics, "BATCH", 7)
    np.testing.assert_array_equal(even_gradients(case, everything.manual_seed(0)), whole)
    monkeypatch.setattr(poison_forensics, "ENTRIES", 9 * ROWS + 1)
    rows = even_gradients(case, everything.manual_seed(0))
    drawn = torch.randperm(whole.shape[1], generator=everything.manual_seed(0))[:9].sort().values
    expected = nn.functional.normalize(torch.from_numpy(whole)[:, drawn], dim=1)
    np.testing.assert_allclose(rows, expected, atol=1e-6)


def stub_verdicts(monkeypatch: pytest.MonkeyPatch, verdicts: list[bool]) -> list[np.ndarray]:
    """Let Poison Forensics find clusters guilty as told; returns the clusters it asks about."""
    asked: list[np.ndarray] = []

    def is_guilty(self, cluster, generator) -> bool:
        asked.append(cluster)
        return verdicts[len(asked) - 1]

    monkeypatch.setattr(Inquiry, "is_guilty", is_guilty)
    return asked


def test_forensics_splits_guilty_halves_and_drops_innocent_ones(monkeypatch) -> None:
    asked = stub_verdicts(monkeypatch, [True, False, True, True])
    flags = detect(PoisonForensics(), make_case())
    np.testing.assert_array_equal(np.sort(np.concatenate(asked[:2])), np.arange(ROWS))
    np.testing.assert_array_equal(np.sort(np.concatenate(asked[2:])), np.sort(asked[0]))
    np.testing.assert_array_equal(np.flatnonzero(flags.mask), np.sort(asked[0]))
    assert flags.suspicion[asked[0]].min() > flags.suspicion[asked[1]].max()


@pytest.mark.parametrize(("verdict", "flagged"), [(True, ROWS), (False, 0)])
def test_forensics_where_the_first_split_tells_nothing(monkeypatch, verdict, flagged) -> None:
    stub_verdicts(monkeypatch, [verdict, verdict])
    assert detect(PoisonForensics(), make_case()).mask.sum() == flagged


def test_forensics_stops_at_its_depth(monkeypatch) -> None:
    asked = stub_verdicts(monkeypatch, [True, False, True, False])
    flags = detect(PoisonForensics(rounds=2), make_case())
    np.testing.assert_array_equal(np.flatnonzero(flags.mask), np.sort(asked[2]))


def test_forensics_keeps_the_rows_that_caused_the_incident() -> None:
    """A trained network with a planted trigger, asked about one triggered image."""
    split = Split(make_images(400, seed=1), make_images(80, seed=2))
    recipe = Recipe(epochs=12, batch_size=32, learning_rate=0.1)
    trainer = make_trainer(SmallCnn(width=8), recipe, seed=0, stream="law", scratch=None)
    attack = BadNets(
        target_class="b", victim_class="a", pattern="square", margin=0, value=1.0,
        poison_fraction=0.1,
    )  # fmt: skip
    surrogate = Surrogate(recipe, nn.Identity, None)
    planted = attack.poison(split, torch.Generator().manual_seed(0), surrogate)
    model = trainer.fit(planted.train).model
    one = torch.zeros(1, dtype=torch.int64)
    queries = Queries(planted.probe.images(np.arange(1)), one + 1, one, one)
    case = Case(planted.train, model, queries, np.zeros((1, 400), dtype=np.float32))
    flags = detect(PoisonForensics(batch_size=64), case)
    poisoned = planted.truth.poisoned
    assert flags.mask[poisoned].mean() > 0.9
    assert poisoned[flags.mask].mean() > 0.25  # of a base rate of 0.1


def test_forensics_unlearns_right_rows_of_the_cluster_and_learns_the_rest() -> None:
    images = make_images(6, seed=1)
    logits = torch.eye(4)[[0, 1, 2, 0, 0, 1]] * 3  # of labels 0 1 2 3 0 1; row 3 is wrong
    inside = torch.tensor([True, True, False, True, False, False])
    objective = Unlearning(images, inside, 10)
    loss = objective(lambda batch: logits, images.images(), np.arange(6))
    scores = logits.log_softmax(1)
    even = -scores[[0, 1]].mean()
    rest = -torch.stack([scores[2, 2], scores[4, 0], scores[5, 1]]).mean()
    torch.testing.assert_close(loss, 10 * (even + rest))
    forgotten = Unlearning(images, torch.tensor([False, False, False, True, False, False]), 1)
    only_rest = forgotten(lambda batch: logits, images.images(), np.arange(6))
    assert float(only_rest) == pytest.approx(
        float(
            -scores.gather(1, images.targets()[:, None])[
                inside.new_tensor([1, 1, 1, 0, 1, 1])
            ].mean()
        ),
        rel=1e-5,
    )
