"""Networks of a user for the factory, most of which cannot be used."""

import torch
from torch import Tensor, nn


class Layerless(nn.Module):
    """Averages channels and pads: logits without a layer EK-FAC could treat."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scale = nn.BatchNorm1d(num_classes)
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x.flatten(1)[:, : self.num_classes])


class Broken(nn.Sequential):
    """Raises something that is no RuntimeError."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no such luck")


class Pair(nn.Sequential):
    """Returns more than logits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Positioned(nn.Module):
    """Adds a parameter of its own to every pixel, which has no EK-FAC factors."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(64))
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1) + self.places)


def layerless(num_classes: int) -> nn.Module:
    return Layerless(num_classes)


def broken(num_classes: int) -> nn.Module:
    return Broken(nn.Linear(64, num_classes))


def pair(num_classes: int) -> nn.Module:
    return Pair(nn.Linear(64, num_classes))


def positioned(num_classes: int) -> nn.Module:
    return Positioned(num_classes)


def narrow(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
