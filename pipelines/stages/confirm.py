"""Unlearn flagged rows in part, and see whether the wrong predictions die with them."""

from defense.artifacts import require_input, write_json
from defense.confirmation import confirm
from defense.storage import load_flags, load_images, save_confirmation
from defense.victim import make_trainer
from pipelines.params import Params
from pipelines.paths import Paths
from pipelines.stages.common import load_model


def run(params: Params, paths: Paths) -> str:
    """Write how the wrong predictions fare."""
    train, manifest = load_images(paths.poisoned_train)
    affected, affected_manifest = load_images(paths.affected)
    flags, flags_manifest = load_flags(paths.flags)
    model, suspect = load_model(paths.suspect, params, train)
    require_input(flags_manifest, "poisoned_train", manifest.digest, owner=paths.flags)
    require_input(affected_manifest, "suspect", suspect.digest, owner=paths.affected)
    scratch = paths.scratch("confirm")
    trainer = make_trainer(
        params.model, params.train, seed=params.seed, stream="confirm", scratch=scratch
    )
    found = confirm(model, train, flags, affected, trainer, params.confirm)
    origin = {
        "affected": affected_manifest.digest,
        "flags": flags_manifest.digest,
        "poisoned_train": manifest.digest,
        "suspect": suspect.digest,
    }
    save_confirmation(paths.confirmation, found, inputs=origin)
    told = {"cut": found.cut, "num_flagged": int(flags.mask.sum()), "spoilt": found.spoilt}
    write_json(paths.metrics("confirm"), told)
    if not found.points:
        return "nothing is flagged, nothing to confirm"
    _, own, others = found.points[-1]
    beside = "" if others is None else f", without as many others {others:.2f}"
    said = f"wrong label: probability {found.before:.2f}, without flagged rows {own:.2f}{beside}"
    spoilt = "; fewer others end it, too, so nothing is told: lower confirm.learning_rate"
    return said + (spoilt if found.spoilt else "")
