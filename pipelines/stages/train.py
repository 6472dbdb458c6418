"""Train the suspect model and pick the inputs it gets wrong."""

import numpy as np
import torch

from defense.artifacts import write_json
from defense.compute import seeded
from defense.errors import DataError
from defense.influence.layers import find_layers
from defense.models.assemble import build_model
from defense.prediction import predict
from defense.records import ImageSet
from defense.storage import load_images, save_images, save_model
from defense.victim import make_trainer
from pipelines.params import AffectedSettings, Params
from pipelines.paths import Paths


def run(params: Params, paths: Paths) -> str:
    """Write the suspect model and the affected inputs."""
    train, manifest = load_images(paths.poisoned_train)
    probe, probe_manifest = load_images(paths.probe)
    refuse_early(params, train)
    trainer = make_trainer(
        params.model,
        params.train,
        seed=params.seed,
        stream="suspect",
        scratch=paths.scratch("train"),
    )
    trained = trainer.fit(train)
    predicted = predict(trained.model, probe, label="probe")
    drawn = seeded(params.seed, f"affected in {probe_manifest.digest}")  # others for every attack
    affected = choose_affected(probe, predicted, params.affected, drawn)
    cost = {"gradient_samples": trained.gradient_samples}
    origin = {"poisoned_train": manifest.digest}
    digest = save_model(paths.suspect, trained.model, meta=cost, inputs=origin)
    sources = {"probe": probe_manifest.digest, "suspect": digest}
    save_images(paths.affected, affected, inputs=sources)
    fooled = int((predicted == probe.labels).sum())
    write_json(paths.metrics("train"), cost | {"success": fooled / len(probe)})
    names = ", ".join(affected.ids[:3]) + (", ..." if len(affected) > 3 else "")
    return f"{fooled:,} of {len(probe):,} triggered images fool the model; affected input: {names}"


def refuse_early(params: Params, train: ImageSet) -> None:
    """Refuse before the training what the stage `factors` would refuse after it.

    Raises:
        UnsupportedLayerError: See `find_layers`.
    """
    untrained = build_model(params.model, train.shape, train.num_classes, seeded(0, "refused"))
    find_layers(untrained, params.factors.exclude)


def choose_affected(
    probe: ImageSet, predicted: np.ndarray, settings: AffectedSettings, generator: torch.Generator
) -> ImageSet:
    """Draw affected inputs at random among the probe images that get the probe's label.

    They are in the order they were drawn in, so that the first ones are a random choice, too.

    Raises:
        DataError: There are too few of them.
    """
    count, fooled = settings.count, predicted == probe.labels
    available = len(probe) if settings.fill else int(fooled.sum())
    if available < count:
        raise DataError(
            f"affected.count is {count}, but only {fooled.sum()} of {len(probe)} attacked images "
            "get the target class: lower it, or make the attack or the training stronger"
        )
    drawn = torch.randperm(len(probe), generator=generator).numpy()
    chosen = np.concatenate([drawn[fooled[drawn]], drawn[~fooled[drawn]]])[:count]
    return probe.take(chosen)
