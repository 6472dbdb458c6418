"""Store the direction of every training row, to be compared with inputs and with each other."""

from defense.artifacts import require_input
from defense.influence.store import build_store
from defense.storage import load_factors, load_images
from pipelines.params import Params
from pipelines.paths import Paths
from pipelines.stages.common import load_model


def run(params: Params, paths: Paths) -> str:
    """Write the directions."""
    train, manifest = load_images(paths.poisoned_train)
    model, suspect = load_model(paths.suspect, params, train)
    factors, factors_manifest = load_factors(paths.factors)
    require_input(factors_manifest, "suspect", suspect.digest, owner=paths.factors)
    require_input(factors_manifest, "poisoned_train", manifest.digest, owner=paths.factors)
    scratch = paths.scratch("directions")
    store = build_store(model, factors, train, params.directions.store(), scratch=scratch)
    origin = {
        "factors": factors_manifest.digest,
        "poisoned_train": manifest.digest,
        "suspect": suspect.digest,
    }
    store.save(paths.directions, inputs=origin)
    return f"directions of {len(store.rows):,} rows, {store.rows[0].nbytes:,} bytes each"
