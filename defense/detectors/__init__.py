"""Detectors: from influence scores to flagged training rows."""

from typing import Annotated

from pydantic import Field

from defense.detectors.delta_influence import DeltaInfluence
from defense.detectors.influence_threshold import InfluenceThreshold

AnyDetector = Annotated[
    DeltaInfluence | InfluenceThreshold,
    Field(discriminator="name"),
]

__all__ = ["AnyDetector"]
