"""Score every training row against the affected inputs and their transforms."""

import logging

from torch import nn

from defense.artifacts import require_input
from defense.compute import seeded
from defense.influence.queries import make_queries
from defense.influence.scores import pairwise_scores
from defense.prediction import predict
from defense.records import ImageSet
from defense.storage import load_factors, load_images, save_scores
from pipelines.params import Params
from pipelines.paths import Paths
from pipelines.stages.common import load_model

logger = logging.getLogger(__name__)


def run(params: Params, paths: Paths) -> str:
    """Write the queries and their scores."""
    train, manifest = load_images(paths.poisoned_train)
    affected, affected_manifest = load_images(paths.affected)
    model, suspect = load_model(paths.suspect, params, train)
    factors, factors_manifest = load_factors(paths.factors)
    require_input(factors_manifest, "suspect", suspect.digest, owner=paths.factors)
    require_input(factors_manifest, "poisoned_train", manifest.digest, owner=paths.factors)
    require_input(affected_manifest, "suspect", suspect.digest, owner=paths.affected)
    warn_of_other_labels(model, affected)
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


def warn_of_other_labels(model: nn.Module, affected: ImageSet) -> None:
    """Warn if the model takes affected inputs for something else than they are labelled as."""
    said = predict(model, affected, label="affected")
    names, wrong = affected.class_names, said != affected.labels
    if wrong.any():
        first = int(wrong.argmax())
        logger.warning(
            "%d of %d affected inputs are not labelled as the model takes them, such as %s, "
            "labelled %s and taken for %s: nothing may be found for these; label them as predicted",
            wrong.sum(), len(affected), affected.ids[first],
            names[affected.labels[first]], names[said[first]],
        )  # fmt: skip
