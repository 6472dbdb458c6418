"""Networks of a user that cannot be used, for the factory."""

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


def layerless(num_classes: int) -> nn.Module:
    return Layerless(num_classes)


def broken(num_classes: int) -> nn.Module:
    return Broken(nn.Linear(64, num_classes))


def pair(num_classes: int) -> nn.Module:
    return Pair(nn.Linear(64, num_classes))


def narrow(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
