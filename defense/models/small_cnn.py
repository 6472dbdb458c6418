"""A network for images of a few pixels, such as scikit-learn's 8x8 digits."""

from typing import Literal

from pydantic import Field
from torch import nn

from defense.contracts import Architecture


class SmallCnn(Architecture):
    """Two convolutions, a pooling and two linear layers; no batch norm.

    Attributes:
        width: Channels of the first convolution.
        hidden: Units of the hidden linear layer.
    """

    name: Literal["small_cnn"] = "small_cnn"
    width: int = Field(16, gt=0)
    hidden: int = Field(64, gt=0)

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """See `Architecture.build`."""
        channels, height, width = shape
        cells = (height // 2) * (width // 2)
        return nn.Sequential(
            nn.Conv2d(channels, self.width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(self.width, 2 * self.width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * self.width * cells, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, num_classes),
        )
