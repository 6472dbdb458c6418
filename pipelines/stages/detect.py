"""Flag the training rows that caused the affected predictions."""

from defense.artifacts import require_input, write_json
from defense.records import Case
from defense.storage import load_images, load_scores, save_flags
from pipelines import paths
from pipelines.params import Params
from pipelines.stages.common import load_model


def run(params: Params) -> str:
    """Write the flags."""
    train, manifest = load_images(paths.POISONED_TRAIN)
    model, suspect = load_model(paths.SUSPECT, params, train)
    (queries, scores), scores_manifest = load_scores(paths.SCORES)
    require_input(scores_manifest, "poisoned_train", manifest.digest, owner=paths.SCORES)
    require_input(scores_manifest, "suspect", suspect.digest, owner=paths.SCORES)
    flags = params.detector.detect(Case(train, model, queries, scores))
    origin = {"scores": scores_manifest.digest, "poisoned_train": manifest.digest}
    save_flags(paths.FLAGS, flags, inputs=origin)
    summary = {"num_flagged": int(flags.mask.sum()), "verdict": flags.verdict}
    write_json(paths.METRICS / "detect.json", summary)
    return f"{flags.verdict}: {flags.mask.sum():,} of {len(train):,} rows flagged"
