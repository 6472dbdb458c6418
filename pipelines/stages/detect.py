"""Flag the training rows that caused the affected predictions."""

from dataclasses import replace

from defense.artifacts import read_manifest, require_input, write_json
from defense.compute import seeded
from defense.influence.directions import StoredDirections
from defense.influence.store import load_store
from defense.records import Case
from defense.storage import blinded, load_factors, load_images, load_scores, save_flags
from pipelines.params import Params
from pipelines.paths import Paths
from pipelines.stages.common import load_model


def run(params: Params, paths: Paths) -> str:
    """Write the flags."""
    train, manifest = load_images(paths.poisoned_train)
    model, suspect = load_model(paths.suspect, params, train)
    (queries, scores), scores_manifest = load_scores(paths.scores)
    require_input(scores_manifest, "poisoned_train", manifest.digest, owner=paths.scores)
    require_input(scores_manifest, "suspect", suspect.digest, owner=paths.scores)
    origin = {
        "scores": scores_manifest.digest,
        "poisoned_train": manifest.digest,
        "suspect": suspect.digest,
    }
    case, origin = with_directions(Case(blinded(train), model, queries, scores), origin, paths)
    generator = seeded(params.seed, "detect")
    flags = params.detector.detect(case, generator, paths.scratch("detect"))
    save_flags(paths.flags, flags, inputs=origin)
    summary = {"num_flagged": int(flags.mask.sum()), "verdict": flags.verdict}
    write_json(paths.metrics("detect"), summary)
    found = f"{flags.verdict}: {flags.mask.sum():,} of {len(train):,} rows flagged"
    own = [one.num_flagged for one in flags.incidents if one.affected]
    apart = flags.mask.any() and own and not any(own)
    return found + (", by a class as a whole, none by the affected inputs" if apart else "")


def with_directions(
    case: Case, origin: dict[str, str], paths: Paths
) -> tuple[Case, dict[str, str]]:
    """Add the directions of the rows, and the test set as controls, to what a detector may know."""
    test, test_manifest = load_images(paths.test)
    factors, factors_manifest = load_factors(paths.factors)
    manifest = read_manifest(paths.directions)
    seen = {"factors": factors_manifest.digest, "poisoned_train": origin["poisoned_train"]}
    for role, digest in seen.items():
        require_input(manifest, role, digest, owner=paths.directions)
    store = load_store(paths.directions)
    directions = StoredDirections.of(store, case.model, factors)
    origin = origin | {"directions": manifest.digest, "test": test_manifest.digest}
    return replace(case, directions=directions, controls=blinded(test)), origin
