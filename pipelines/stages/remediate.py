"""Remove the effect of the flagged rows."""

from defense.artifacts import require_input, write_json
from defense.errors import DataError
from defense.storage import load_flags, load_images, save_model
from defense.victim import make_trainer
from pipelines import paths
from pipelines.params import Params
from pipelines.stages.common import load_model


def run(params: Params) -> str:
    """Write the remediated model."""
    train, manifest = load_images(paths.POISONED_TRAIN)
    model, suspect = load_model(paths.SUSPECT, params, train)
    flags, flags_manifest = load_flags(paths.FLAGS)
    require_input(flags_manifest, "poisoned_train", manifest.digest, owner=paths.FLAGS)
    if flags.mask.all():
        raise DataError("every training row is flagged, nothing is left to train on")
    trainer = make_trainer(
        params.model,
        params.train,
        seed=params.seed,
        stream="remediated",
        scratch=paths.SCRATCH / "remediate",
    )
    done = params.unlearner.unlearn(
        model, train.where(flags.mask), train.where(~flags.mask), trainer
    )
    cost = {"gradient_samples": done.gradient_samples}
    origin = {
        "poisoned_train": manifest.digest,
        "flags": flags_manifest.digest,
        "suspect": suspect.digest,
    }
    save_model(paths.REMEDIATED, done.model, meta=cost, inputs=origin)
    write_json(paths.METRICS / "remediate.json", cost)
    return f"{params.unlearner.name} spent {done.gradient_samples:,} per-sample gradients"
