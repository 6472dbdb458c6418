"""Architectures: networks from normalised images to logits, and the model around them."""

from typing import Annotated

from pydantic import Field

from defense.models.assemble import build_model
from defense.models.factory import Factory
from defense.models.resnet import ResNet9, ResNet18
from defense.models.small_cnn import SmallCnn

AnyArchitecture = Annotated[
    ResNet18 | ResNet9 | SmallCnn | Factory,
    Field(discriminator="name"),
]

__all__ = ["AnyArchitecture", "build_model"]
