"""Per-sample gradients against a loop of autograd, for every kind of layer."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import VisionTransformer

from defense.errors import UnsupportedLayerError
from defense.influence.faithful import require_faithful
from defense.influence.layers import coverage, find_layers, flat_gradient
from defense.influence.network import Network
from defense.influence.task import CLASSIFICATION, cotangents
from defense.records import image_set
from tests.parity.layout import per_sample_gradient

LAYERS = {
    "plain": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "bias": lambda: nn.Conv2d(4, 6, 3),
    "stride": lambda: nn.Conv2d(4, 6, 3, stride=2),
    "stride_pair": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1)),
    "padding": lambda: nn.Conv2d(4, 6, 3, padding=(2, 1)),
    "padding_same": lambda: nn.Conv2d(4, 6, (2, 3), padding="same"),
    "padding_reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "padding_circular": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"),
    "dilation": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "groups_no_bias": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2, padding=1),
    "everything": lambda: nn.Conv2d(4, 8, 3, 2, 2, 2, 2),
    "one_by_one": lambda: nn.Conv2d(4, 6, 1),
}


def gradients_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor):
    network = Network(model)
    outputs = network.outputs(images)
    slope = cotangents(CLASSIFICATION.loss, outputs, labels)
    result: dict[str, torch.Tensor] = {}
    network.backward(
        outputs, slope, lambda name, trace: result.__setitem__(name, per_sample_gradient(trace))
    )
    return result


def loop_gradients(model: nn.Module, images: torch.Tensor, labels: torch.Tensor):
    """One backward pass per sample."""
    model.eval()
    rows: dict[str, list[torch.Tensor]] = {}
    for image, label in zip(images, labels, strict=True):
        model.zero_grad()
        F.cross_entropy(model(image[None]), label[None]).backward()
        for name, layer in find_layers(model).items():
            bias = None if layer.bias is None else layer.bias.grad
            rows.setdefault(name, []).append(flat_gradient(layer, layer.weight.grad, bias))
    return {name: torch.stack(parts) for name, parts in rows.items()}


def check(model: nn.Module, images: torch.Tensor, classes: int = 5) -> None:
    labels = torch.arange(len(images)) % classes
    ours, loop = gradients_of(model, images, labels), loop_gradients(model, images, labels)
    assert ours.keys() == loop.keys()
    for name in loop:
        torch.testing.assert_close(ours[name], loop[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_convolution(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind](), nn.Tanh(), nn.Flatten(), nn.LazyLinear(5))
    images = torch.randn(7, 4, 9, 8)
    model(images)  # sizes the lazy layer
    check(model, images)


def test_linear_over_tokens() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3, bias=False), nn.Flatten())
    check(model, torch.randn(5, 4, 6), classes=12)


class Keyword(nn.Module):
    """Calls a layer with its input as a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(input=x.flatten(1))


def test_inputs_may_be_keywords() -> None:
    check(Keyword(), torch.randn(7, 3, 2, 2))


def test_in_place_activation_after_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(6), nn.Flatten(), nn.LazyLinear(5)
    )
    images = torch.randn(7, 4, 6, 6)
    model(images)
    check(model, images)


def test_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).train()
    gradients_of(model, torch.randn(3, 3, 2, 2), torch.tensor([0, 1, 2]))
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model[1]._forward_hooks


def test_refuses_a_model_without_layers() -> None:
    for model in (nn.Sequential(nn.Flatten(), nn.ReLU()), nn.LSTM(4, 4)):
        with pytest.raises(UnsupportedLayerError, match="at least one Linear or Conv2d"):
            find_layers(model)


def test_refuses_other_parameters_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    with pytest.raises(UnsupportedLayerError, match=r"known for 1 \(LSTM\).*exclude: \[1\]"):
        find_layers(model)
    assert list(find_layers(model, ("1",))) == ["0"]


def test_tells_all_that_a_vision_transformer_leaves_out() -> None:
    """What the message says to exclude is enough, and leaves every layer that is called."""
    torch.manual_seed(0)
    model = VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=3).eval()
    with pytest.raises(UnsupportedLayerError) as refused:
        find_layers(model)
    names = str(refused.value).split("exclude: ")[1].strip("[]").split(", ")
    attention = [f"encoder.layers.encoder_layer_{n}.self_attention" for n in range(2)]
    assert sorted(names) == sorted(["class_token", "encoder.pos_embedding", *attention])
    layers = find_layers(model, names)
    mlp = [f"encoder.layers.encoder_layer_{n}.mlp.{part}" for n in range(2) for part in (0, 3)]
    assert sorted(layers) == sorted(["conv_proj", "heads.head", *mlp])
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
    names_of = np.arange(6).astype(np.str_)
    images = image_set(pixels, np.arange(6) % 3, names_of, ("a", "b", "c"))
    require_faithful(Network(model, names), images)


def test_a_convolution_beside_a_parameter_of_its_module_is_kept() -> None:
    """As in ConvNeXt, whose blocks scale what their layers say."""
    model = Scaled()
    assert list(find_layers(model, ("gain",))) == ["0"]
    with pytest.raises(UnsupportedLayerError, match=r"known for gain \(Scaled\)"):
        find_layers(model)
    with pytest.raises(UnsupportedLayerError, match=r"that has no factors by itself: 0\.weight"):
        find_layers(model, ("gain", "0.weight"))


class Scaled(nn.Sequential):
    """A layer and a factor."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 2, 1))
        self.gain = nn.Parameter(torch.ones(2, 1, 1))


def test_normalisations_are_left_out_and_counted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    covered = coverage(model, find_layers(model))
    assert covered.share == pytest.approx(122 / 130)
    assert str(covered) == "93.85% of the parameters; left out: BatchNorm2d (8)"


def test_refuses_batch_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    for exclude in ((), ("1",)):  # left out, it would still mix the samples
        with pytest.raises(UnsupportedLayerError, match="keeps no running statistics"):
            find_layers(model, exclude)


class Merged(nn.Module):
    """Folds the tokens into the batch, as some transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]).sum(1)


def test_refuses_inputs_without_samples_in_front() -> None:
    with pytest.raises(UnsupportedLayerError, match="expected the samples in front"):
        gradients_of(Merged(), torch.randn(3, 4, 6), torch.tensor([0, 1, 2]))


def test_refuses_a_layer_that_runs_twice() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(UnsupportedLayerError, match="more than once"):
        gradients_of(
            nn.Sequential(layer, nn.Tanh(), layer), torch.randn(2, 4), torch.tensor([0, 1])
        )


class Standardised(nn.Conv2d):
    """Convolves with a standardised weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Same(nn.Conv2d):
    """Pads on its own."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(nn.functional.pad(x, (0, 1, 0, 1)), weight, bias)


class Renamed(nn.Linear):
    """A linear layer by another name."""


@pytest.mark.parametrize(
    "layer",
    [
        Standardised(3, 4, 3),
        Same(3, 4, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_refuses_layers_that_change_their_weight_or_input(layer: nn.Module) -> None:
    model = nn.Sequential(layer, nn.Flatten(), Renamed(4, 2))
    with pytest.raises(UnsupportedLayerError, match=r"0 \(.*changes its weight or its input"):
        find_layers(model)
    assert list(find_layers(model, ("0",))) == ["2"]
