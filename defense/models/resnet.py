"""Residual networks for small images."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from defense.contracts import Architecture


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, section 3.3, option B)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        """Build a block from `inner` to `outer` channels."""
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, inner, h, w]`` to ``[n, outer, h/stride, w/stride]``."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(Architecture):
    """ResNet-18 with the CIFAR stem: 3x3 convolution, no max-pool (methods of the paper).

    Attributes:
        width: Channels of the first stage; 64 is the standard network.
    """

    name: Literal["resnet18"] = "resnet18"
    width: int = Field(64, gt=0)

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """See `Architecture.build`."""
        width = self.width
        stages = [(width, width, 1)]
        stages += [(width * 2**i, width * 2 ** (i + 1), 2) for i in range(3)]
        blocks = [
            block
            for inner, outer, stride in stages
            for block in (BasicBlock(inner, outer, stride), BasicBlock(outer, outer, 1))
        ]
        return nn.Sequential(
            nn.Conv2d(shape[0], width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, num_classes),
        )


class Residual(nn.Module):
    """Add a module's output to its input."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap `module`."""
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, c, h, w]`` to the same shape."""
        return x + self.module(x)


class Scale(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float) -> None:
        """Keep the factor."""
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Scale a tensor of any shape."""
        return x * self.factor


def conv_block(inner: int, outer: int, kernel: int = 3, stride: int = 1, pad: int = 1) -> nn.Module:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inner, outer, kernel, stride, pad, bias=False), nn.BatchNorm2d(outer), nn.ReLU()
    )


class ResNet9(Architecture):
    """The ResNet-9 of the DAWNBench family that data-attribution papers use.

    Attributes:
        width: Channels of the first convolution; the others have 2 and 4 times as many.
    """

    name: Literal["resnet9"] = "resnet9"
    width: int = Field(64, gt=0)

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """See `Architecture.build`; images need at least 16 pixels per side."""
        one, two, four = self.width, 2 * self.width, 4 * self.width
        return nn.Sequential(
            conv_block(shape[0], one),
            conv_block(one, two, kernel=5, stride=2, pad=2),
            Residual(nn.Sequential(conv_block(two, two), conv_block(two, two))),
            conv_block(two, four),
            nn.MaxPool2d(2),
            Residual(nn.Sequential(conv_block(four, four), conv_block(four, four))),
            conv_block(four, two, pad=0),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(two, num_classes, bias=False),
            Scale(0.2),
        )
