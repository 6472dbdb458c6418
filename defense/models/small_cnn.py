"""A network for images of a few pixels, such as scikit-learn's 8x8 digits."""

from typing import Literal

from pydantic import Field
from torch import nn

from defense.contracts import Architecture
from defense.models.resnet import conv_block


class SmallCnn(Architecture):
    """Three convolutions with batch norm, a pooling, an average over places, a linear layer.

    Attributes:
        width: Channels of the first convolution; the others have 2 and 4 times as many.
    """

    name: Literal["small_cnn"] = "small_cnn"
    width: int = Field(16, gt=0)

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """See `Architecture.build`; images need at least 2 pixels per side."""
        width = self.width
        return nn.Sequential(
            conv_block(shape[0], width),
            conv_block(width, 2 * width),
            nn.MaxPool2d(2),
            conv_block(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, num_classes),
        )
