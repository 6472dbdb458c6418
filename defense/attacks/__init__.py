"""Attacks: known poison planted in a train set, so that the defence can be drilled."""

from typing import Annotated

from pydantic import Field

from defense.attacks.badnets import BadNets
from defense.attacks.blended import Blended

AnyAttack = Annotated[
    BadNets | Blended,
    Field(discriminator="name"),
]

__all__ = ["AnyAttack"]
