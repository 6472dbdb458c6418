"""Unlearners: remove the effect of flagged rows from a model."""

from typing import Annotated

from pydantic import Field

from defense.unlearning.bad_teacher import BadTeacher
from defense.unlearning.fine_tuning import CatastrophicForgetting
from defense.unlearning.potion import Potion
from defense.unlearning.retraining import ExactUnlearning
from defense.unlearning.scrub import CorrectiveScrub, Scrub
from defense.unlearning.ssd import SelectiveSynapticDampening

AnyUnlearner = Annotated[
    ExactUnlearning
    | CatastrophicForgetting
    | SelectiveSynapticDampening
    | Scrub
    | CorrectiveScrub
    | BadTeacher
    | Potion,
    Field(discriminator="name"),
]

__all__ = ["AnyUnlearner"]
