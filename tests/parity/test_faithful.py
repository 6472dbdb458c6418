"""Layers whose gradient is not that of their parameters are refused, all others are not."""

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from defense.errors import UnsupportedLayerError
from defense.influence.factors import FactorSettings, fit_factors
from defense.influence.faithful import require_faithful
from defense.influence.network import Network
from defense.records import ImageSet
from tests.conftest import make_images
from tests.parity.test_per_sample_gradients import LAYERS


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return make_images(6, seed=4)


class Tied(nn.Module):
    """Uses the weight, or the bias, of one layer for another."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(768, 768), nn.Linear(768, 768)
        if bias:
            self.second.bias = self.first.bias
        else:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.flatten(1)).tanh())


class Functional(nn.Module):
    """Uses a weight without its layer, too, or instead."""

    def __init__(self, *, instead: bool) -> None:
        super().__init__()
        self.layer, self.instead = nn.Linear(768, 768), instead

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return F.linear(x if self.instead else self.layer(x).tanh(), self.layer.weight)


class Auxiliary(nn.Module):
    """Has a layer that is used in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.aid = nn.Linear(768, 4), nn.Linear(768, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.layer(x) + self.aid(x) if self.training else self.layer(x)


def overridden() -> nn.Module:
    layer = nn.Linear(768, 4)
    layer.forward = lambda x: F.linear(x, layer.weight - layer.weight.mean(), layer.bias)
    return nn.Sequential(nn.Flatten(), layer)


def pruned() -> nn.Module:
    layer = nn.Linear(768, 4)
    prune.l1_unstructured(layer, "bias", 2)
    return nn.Sequential(nn.Flatten(), layer)


def hooked(change) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 4))
    for layer in model[:2]:
        layer.register_forward_hook(lambda module, inputs, output: change(output))
    return model


REFUSED = {
    "tied weight": lambda: Tied(bias=False),
    "tied bias": lambda: Tied(bias=True),
    "a weight used twice": lambda: Functional(instead=False),
    "a weight without its layer": lambda: Functional(instead=True),
    "an overridden method": overridden,
    "a pruned bias": pruned,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses_what_is_not_the_gradient_of_the_parameters(kind: str, images: ImageSet) -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedLayerError, match=r"(used elsewhere|changes its weight)"):
        fit_factors(REFUSED[kind]().eval(), images, FactorSettings(), torch.Generator())


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_accepts_networks_of_torchvision(name: str) -> None:
    """Depthwise and grouped convolutions, squeeze and excitation, channels that change places."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=4).eval()
    require_faithful(Network(model), make_images(4, seed=4, shape=(3, 64, 64)))


def test_all_layers_that_are_not_are_named_at_once(images: ImageSet) -> None:
    model = nn.Sequential(Tied(bias=False), nn.Linear(768, 4)).eval()
    with pytest.raises(UnsupportedLayerError, match=r"exclude: \[0\.first, 0\.second\]"):
        fit_factors(model, images, FactorSettings(), torch.Generator())
    settings = FactorSettings(exclude=("0.first", "0.second"))
    assert fit_factors(model, images, settings, torch.Generator()).coverage.share < 0.01


@pytest.mark.parametrize("kind", [*LAYERS, "unused", "hooks"])
def test_accepts_every_kind_of_layer(kind: str) -> None:
    torch.manual_seed(0)
    if kind in LAYERS:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), LAYERS[kind](), nn.ReLU(), nn.Flatten())
    else:
        model = Auxiliary() if kind == "unused" else hooked(lambda output: 2 * output)
    require_faithful(Network(model.eval()), make_images(6, seed=4))


def test_hooks_of_the_model_are_kept(images: ImageSet) -> None:
    torch.manual_seed(0)
    model = hooked(lambda output: 2 * output).eval()
    outputs, _ = Network(model).rows(images, np.arange(6))
    torch.testing.assert_close(outputs.detach(), model(images.images()).detach())


def test_an_old_weight_normalisation_is_refused_by_name(images: ImageSet) -> None:
    model = nn.Sequential(nn.Flatten(), nn.utils.spectral_norm(nn.Linear(768, 4)))
    model(images.images())  # leaves a weight that cannot be copied
    with pytest.raises(UnsupportedLayerError, match="changes its weight"):
        fit_factors(model.eval(), images, FactorSettings(), torch.Generator())


class Mixing(nn.Module):
    """Gives an output that is not its sample's own."""

    def __init__(self, change) -> None:
        super().__init__()
        self.layer, self.change = nn.Linear(768, 4), change

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.change(x.flatten(1)))


@pytest.mark.parametrize(
    "change",
    [lambda x: x - x.mean(0), lambda x: F.batch_norm(x, None, None, training=True), F.dropout],
    ids=["mean", "statistics", "dropout"],
)
def test_outputs_that_depend_on_the_batch_or_on_chance_are_refused(change, images) -> None:
    with pytest.raises(UnsupportedLayerError, match="other samples of its batch, or on chance"):
        fit_factors(Mixing(change).eval(), images, FactorSettings(), torch.Generator())


def test_a_name_that_is_no_modules_is_refused(images: ImageSet) -> None:
    with pytest.raises(UnsupportedLayerError, match="that has no factors by itself: hh"):
        fit_factors(Auxiliary().eval(), images, FactorSettings(exclude=("hh",)), torch.Generator())
