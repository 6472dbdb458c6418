"""Remove the effect of the flagged rows."""

from defense.artifacts import require_input, write_json
from defense.contracts import Repair
from defense.errors import DataError
from defense.storage import blinded, load_flags, load_images, save_model
from defense.victim import make_trainer
from pipelines.params import Params
from pipelines.paths import Paths
from pipelines.stages.common import load_model


def run(params: Params, paths: Paths) -> str:
    """Write the remediated model."""
    train, manifest = load_images(paths.poisoned_train)
    model, suspect = load_model(paths.suspect, params, train)
    affected, affected_manifest = load_images(paths.affected)
    flags, flags_manifest = load_flags(paths.flags)
    require_input(flags_manifest, "poisoned_train", manifest.digest, owner=paths.flags)
    if flags.mask.all():
        raise DataError("every training row is flagged, nothing is left to train on")
    trainer = make_trainer(
        params.model,
        params.train,
        seed=params.seed,
        stream="remediated",
        scratch=paths.scratch("remediate"),
    )
    rows = blinded(train)
    repair = Repair(model, rows.where(flags.mask), rows.where(~flags.mask), affected)
    done = params.unlearner.unlearn(repair, trainer)
    cost = {"gradient_samples": done.gradient_samples}
    declared = params.unlearner.max_gradient_samples(
        len(repair.forget), len(repair.retain), params.train
    )
    origin = {
        "poisoned_train": manifest.digest,
        "flags": flags_manifest.digest,
        "suspect": suspect.digest,
        "affected": affected_manifest.digest,
    }
    save_model(paths.remediated, done.model, meta=cost, inputs=origin)
    chosen = {"chosen": done.chosen} if done.chosen else {}
    write_json(paths.metrics("remediate"), cost | {"max_gradient_samples": declared} | chosen)
    name, spent = params.unlearner.name, done.gradient_samples
    return f"{name} spent {spent:,} per-sample gradients of the {declared:,} it may take"
