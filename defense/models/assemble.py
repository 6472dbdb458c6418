"""The model around a network: normalisation is its first layer, its weights are seeded."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from defense.contracts import Architecture
from defense.errors import DefenseError


class Normalize(nn.Module):
    """Subtract the channel means and divide by the channel deviations, kept as buffers."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        """Start as the identity."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise ``[n, c, h, w]`` in [0, 1]."""
        return (images - self.mean) / self.std


def build_model(
    architecture: Architecture,
    shape: tuple[int, int, int],
    num_classes: int,
    generator: torch.Generator,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> nn.Module:
    """Build an untrained model from pixels in [0, 1] to logits.

    Args:
        architecture: The network.
        shape: Channels, height and width of an image.
        num_classes: Number of logits.
        generator: Source of the initial weights; torch's global generator is left alone.
        statistics: Channel means and deviations; identity if the weights are loaded later.

    Raises:
        DefenseError: The network cannot take such images, or does not return their logits.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = architecture.build(shape, num_classes)
    normalize = Normalize(shape[0])
    if statistics is not None:
        normalize.mean.copy_(statistics[0])
        normalize.std.copy_(statistics[1])
    model = nn.Sequential(OrderedDict(normalize=normalize, network=network)).eval()
    _check_logits(model, shape, num_classes)
    return model


@torch.no_grad()
def _check_logits(model: nn.Module, shape: tuple[int, int, int], num_classes: int) -> None:
    """Run one black image through a model."""
    size = "x".join(map(str, shape))
    try:
        logits = model(torch.zeros(1, *shape))
    except Exception as error:  # a user's network may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DefenseError(
            f"model: expected one that takes images {size}, got: {reason}"
        ) from error
    got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if got != [1, num_classes]:
        raise DefenseError(
            f"model: expected logits [1, {num_classes}] for an image {size}, got {got}"
        )
