"""What several stages load in the same way."""

from pathlib import Path

from torch import nn

from defense.artifacts import Manifest
from defense.compute import seeded
from defense.models.assemble import build_model
from defense.records import ImageSet
from defense.storage import load_weights
from pipelines.params import Params


def load_model(path: Path, params: Params, train: ImageSet) -> tuple[nn.Module, Manifest]:
    """Load a saved model of the architecture in `params`, for images like those in `train`."""
    generator = seeded(params.seed, "placeholder")  # the weights are replaced at once
    model = build_model(params.model, train.shape, train.num_classes, generator)
    return model, load_weights(path, model)
