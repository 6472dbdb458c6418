"""Fit the EK-FAC factors of the suspect model."""

from defense.artifacts import require_input, write_json
from defense.compute import seeded
from defense.influence.factors import fit_factors
from defense.storage import load_images, save_factors
from pipelines.params import Params
from pipelines.paths import Paths
from pipelines.stages.common import load_model


def run(params: Params, paths: Paths) -> str:
    """Write the factors."""
    train, manifest = load_images(paths.poisoned_train)
    model, suspect = load_model(paths.suspect, params, train)
    require_input(suspect, "poisoned_train", manifest.digest, owner=paths.suspect)
    generator = seeded(params.seed, "fisher")
    factors = fit_factors(model, train, params.factors, generator, scratch=paths.scratch("factors"))
    origin = {"suspect": suspect.digest, "poisoned_train": manifest.digest}
    save_factors(paths.factors, factors, inputs=origin)
    summary = {
        "coverage": factors.coverage.share,
        "left_out": factors.left_out,
        "error": factors.error,
        "num_differentiated": factors.num_differentiated,
        "num_layers": len(factors.layers),
    }
    write_json(paths.metrics("factors"), summary)
    return str(factors)
