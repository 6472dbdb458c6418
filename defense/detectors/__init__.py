"""Detectors: from the suspect model, its train set and influence scores to flagged rows."""

from typing import Annotated

from pydantic import Field

from defense.detectors.activation_clustering import ActivationClustering
from defense.detectors.delta_influence import DeltaInfluence
from defense.detectors.frequency import FrequencyDetector
from defense.detectors.influence_threshold import InfluenceThreshold
from defense.detectors.normalised_influence import NormalisedInfluence
from defense.detectors.poison_forensics import PoisonForensics
from defense.detectors.spectral_signatures import SpectralSignatures

AnyDetector = Annotated[
    NormalisedInfluence
    | DeltaInfluence
    | InfluenceThreshold
    | ActivationClustering
    | SpectralSignatures
    | FrequencyDetector
    | PoisonForensics,
    Field(discriminator="name"),
]

__all__ = ["AnyDetector"]
