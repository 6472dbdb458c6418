"""Queries: the paper's transforms, seeded, for every size and channel count."""

from dataclasses import replace

import pytest
import torch

from defense.influence.queries import TransformSettings, make_queries, swap_red_green, transforms
from defense.prediction import predict
from pipelines.stages.influence import warn_of_other_labels
from tests.conftest import make_images
from tests.unit.fits import small_model

SIZES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 48)]


def queries(shape, *, seed: int = 0, affected: int = 2, count: int = 50, ablations=False):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(affected, *shape, generator=torch.Generator().manual_seed(9))
    predicted = list(range(affected))
    settings = TransformSettings(num_transforms=count, ablations=ablations)
    return images, make_queries(images, predicted, 10, settings, generator)


@pytest.mark.parametrize("shape", SIZES)
def test_first_query_is_the_affected_input_itself(shape) -> None:
    images, made = queries(shape)
    first = torch.from_numpy(made.changed("none"))
    torch.testing.assert_close(made.images[first], images)
    assert made.labels[first].tolist() == [0, 1]
    assert made.images.shape == (102, *shape)
    assert made.images.min() >= 0
    assert made.images.max() <= 1


@pytest.mark.parametrize("shape", SIZES)
def test_transforms_change_the_image_and_the_label(shape) -> None:
    images, made = queries(shape)
    moved = torch.from_numpy(made.changed("both"))
    assert (made.labels[moved] != made.affected[moved]).all()
    originals = images[made.affected[moved]]
    changed = (made.images[moved] != originals).flatten(1).any(1)
    assert changed.float().mean() > 0.9


def test_labels_are_drawn_evenly_from_all_others() -> None:
    _, made = queries((1, 8, 8), affected=1, count=4500)
    counts = torch.bincount(made.labels[1:], minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 400


def test_same_seed_same_queries_and_torch_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    first, second, other = (queries((3, 32, 32), seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize("shape", SIZES)
def test_every_transform_keeps_the_shape(shape) -> None:
    image = torch.rand(shape)
    ops = transforms(shape)
    assert len(ops) == (7 if shape[0] == 3 else 6)
    for op in ops:
        assert op(image).shape == image.shape
        assert op(image).isfinite().all()


def test_swap_exchanges_the_first_two_channels() -> None:
    image = torch.rand(3, 4, 4)
    assert torch.equal(swap_red_green(image)[0], image[1])
    assert torch.equal(swap_red_green(image)[2], image[2])


def test_ablations_change_one_thing_as_the_transforms_do() -> None:
    images, plain = queries((3, 32, 32), count=9)
    _, made = queries((3, 32, 32), count=9, ablations=True)
    both, image, label = (made.changed(what) for what in ("both", "image", "label"))
    assert both.sum() == image.sum() == label.sum() == 18
    assert torch.equal(made.images[both], plain.images[plain.changed("both")])
    assert torch.equal(made.images[image], made.images[both])
    assert torch.equal(made.labels[image], made.affected[image])
    assert torch.equal(made.images[label], images[made.affected[label]])
    assert torch.equal(made.labels[label], made.labels[both])


def test_affected_inputs_that_the_model_takes_for_something_else_are_told(caplog) -> None:
    """Of an input that is labelled with its true class nothing would be found."""
    model, images = small_model(), make_images(8, seed=4)
    as_taken = replace(images, labels=predict(model, images))
    warn_of_other_labels(model, as_taken)
    assert caplog.records == []
    labels = as_taken.labels.copy()
    labels[3] = (labels[3] + 1) % images.num_classes
    warn_of_other_labels(model, replace(as_taken, labels=labels))
    told = "1 of 8 affected inputs are not labelled as the model takes them, such as "
    assert told + images.ids[3] in caplog.text
