"""Laws of every architecture."""

import pytest
import torch
from torch import nn

from defense.compute import seeded
from defense.contracts import Architecture
from defense.influence.layers import find_layers
from defense.method import members
from defense.models import AnyArchitecture, build_model
from defense.models.factory import Factory
from defense.models.resnet import ResNet18

SHAPE = (3, 16, 16)


def tiny(num_classes: int) -> nn.Module:
    """Build what the factory law asks for."""
    return nn.Sequential(nn.Flatten(), nn.Linear(768, num_classes))


@pytest.fixture(params=members(AnyArchitecture), ids=lambda method: method.__name__)
def architecture(request) -> Architecture:
    if request.param is Factory:
        return Factory(factory="tests.laws.test_architectures:tiny")
    return request.param(width=4)


def build(architecture: Architecture, seed: int = 0) -> nn.Module:
    return build_model(architecture, SHAPE, 5, seeded(seed, "weights"))


def test_gives_logits_that_depend_on_each_image_alone(architecture: Architecture) -> None:
    model = build(architecture)
    images = torch.rand(6, *SHAPE)
    logits = model(images)
    assert logits.shape == (6, 5)
    torch.testing.assert_close(model(images[2:3]), logits[2:3], atol=1e-5, rtol=1e-4)


def test_same_seed_same_weights_and_torch_is_left_alone(architecture: Architecture) -> None:
    state = torch.random.get_rng_state()
    first, second, other = build(architecture), build(architecture), build(architecture, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(
        not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)
    )


def test_has_layers_for_ekfac(architecture: Architecture) -> None:
    assert find_layers(build(architecture))


def test_resnet18_is_the_cifar_network() -> None:
    """Stem of 3x3 without pooling: the first stage sees all pixels, the last 4x4 of 32x32."""
    network = ResNet18().build((3, 32, 32), 10).eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_173_962
    image, shapes = torch.rand(1, 3, 32, 32), []
    for layer in network:
        image = layer(image)
        shapes.append(tuple(image.shape[1:]))
    assert shapes[3:11:2] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
