"""Attacks: known poison planted in a train set, so that the defence can be drilled."""

from typing import Annotated

from pydantic import Field

from defense.attacks.badnets import BadNets
from defense.attacks.blended import Blended
from defense.attacks.sig import Sig
from defense.attacks.smooth import Smooth
from defense.attacks.witches_brew import WitchesBrew

AnyAttack = Annotated[
    BadNets | Smooth | WitchesBrew | Blended | Sig,
    Field(discriminator="name"),
]

__all__ = ["AnyAttack"]
