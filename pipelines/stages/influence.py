"""Score every training row against the affected inputs and their transforms."""

from defense.artifacts import require_input
from defense.compute import seeded
from defense.influence.queries import make_queries
from defense.influence.scores import pairwise_scores
from defense.storage import load_factors, load_images, save_scores
from pipelines import paths
from pipelines.params import Params
from pipelines.stages.common import load_model


def run(params: Params) -> str:
    """Write the queries and their scores."""
    train, manifest = load_images(paths.POISONED_TRAIN)
    affected, affected_manifest = load_images(paths.AFFECTED)
    model, suspect = load_model(paths.SUSPECT, params, train)
    factors, factors_manifest = load_factors(paths.FACTORS)
    require_input(factors_manifest, "suspect", suspect.digest, owner=paths.FACTORS)
    require_input(factors_manifest, "poisoned_train", manifest.digest, owner=paths.FACTORS)
    require_input(affected_manifest, "suspect", suspect.digest, owner=paths.AFFECTED)
    queries = make_queries(
        affected.images(),
        affected.labels.tolist(),
        train.num_classes,
        params.transforms,
        seeded(params.seed, "transforms"),
    )
    scores = pairwise_scores(
        model, factors, queries, train, params.scores, scratch=paths.SCRATCH / "influence"
    )
    origin = {
        "factors": factors_manifest.digest,
        "affected": affected_manifest.digest,
        "poisoned_train": manifest.digest,
        "suspect": suspect.digest,
    }
    save_scores(paths.SCORES, queries, scores, inputs=origin)
    return f"{scores.shape[0]:,} queries scored against {scores.shape[1]:,} rows"
