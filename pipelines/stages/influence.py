"""Score every training row against the affected inputs and their transforms."""

from defense.artifacts import require_input
from defense.compute import seeded
from defense.influence.queries import make_queries
from defense.influence.scores import pairwise_scores
from defense.storage import load_factors, load_images, save_scores
from pipelines.params import Params
from pipelines.paths import Paths
from pipelines.stages.common import load_model


def run(params: Params, paths: Paths) -> str:
    """Write the queries and their scores."""
    train, manifest = load_images(paths.poisoned_train)
    affected, affected_manifest = load_images(paths.affected)
    model, suspect = load_model(paths.suspect, params, train)
    factors, factors_manifest = load_factors(paths.factors)
    require_input(factors_manifest, "suspect", suspect.digest, owner=paths.factors)
    require_input(factors_manifest, "poisoned_train", manifest.digest, owner=paths.factors)
    require_input(affected_manifest, "suspect", suspect.digest, owner=paths.affected)
    queries = make_queries(
        affected.images(),
        affected.labels.tolist(),
        train.num_classes,
        params.transforms,
        seeded(params.seed, "transforms"),
    )
    scores = pairwise_scores(
        model, factors, queries, train, params.scores, scratch=paths.scratch("influence")
    )
    origin = {
        "factors": factors_manifest.digest,
        "affected": affected_manifest.digest,
        "poisoned_train": manifest.digest,
        "suspect": suspect.digest,
    }
    save_scores(paths.scores, queries, scores, inputs=origin)
    return f"{scores.shape[0]:,} queries scored against {scores.shape[1]:,} rows"
