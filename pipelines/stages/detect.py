"""Flag the training rows that caused the affected predictions."""

from defense.artifacts import require_input, write_json
from defense.compute import seeded
from defense.records import Case
from defense.storage import load_images, load_scores, save_flags
from pipelines.params import Params
from pipelines.paths import Paths
from pipelines.stages.common import blinded, load_model


def run(params: Params, paths: Paths) -> str:
    """Write the flags."""
    train, manifest = load_images(paths.poisoned_train)
    model, suspect = load_model(paths.suspect, params, train)
    (queries, scores), scores_manifest = load_scores(paths.scores)
    require_input(scores_manifest, "poisoned_train", manifest.digest, owner=paths.scores)
    require_input(scores_manifest, "suspect", suspect.digest, owner=paths.scores)
    case = Case(blinded(train), model, queries, scores)
    generator = seeded(params.seed, "detect")
    flags = params.detector.detect(case, generator, paths.scratch("detect"))
    origin = {"scores": scores_manifest.digest, "poisoned_train": manifest.digest}
    save_flags(paths.flags, flags, inputs=origin)
    summary = {"num_flagged": int(flags.mask.sum()), "verdict": flags.verdict}
    write_json(paths.metrics("detect"), summary)
    return f"{flags.verdict}: {flags.mask.sum():,} of {len(train):,} rows flagged"
