"""EK-FAC influence functions: factors of the curvature, queries, and pairwise scores."""

from defense.influence.factors import FactorSettings, fit_factors
from defense.influence.queries import TransformSettings, make_queries
from defense.influence.scores import ScoreSettings, pairwise_scores

__all__ = [
    "FactorSettings",
    "ScoreSettings",
    "TransformSettings",
    "fit_factors",
    "make_queries",
    "pairwise_scores",
]
