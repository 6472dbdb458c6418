"""Unlearners: remove the effect of flagged rows from a model."""

from typing import Annotated

from pydantic import Field

from defense.unlearning.fine_tuning import CatastrophicForgetting
from defense.unlearning.retraining import ExactUnlearning

AnyUnlearner = Annotated[
    ExactUnlearning | CatastrophicForgetting,
    Field(discriminator="name"),
]

__all__ = ["AnyUnlearner"]
