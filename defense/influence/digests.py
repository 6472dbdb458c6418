"""Digests of what influence is computed from."""

import hashlib

from torch import nn

from defense.checkpoints import digest_of_model
from defense.errors import ArtifactError
from defense.records import Factors, Queries


def require_own_factors(factors: Factors, model: nn.Module) -> None:
    """Refuse factors that were fitted on another model.

    Raises:
        ArtifactError: They were.
    """
    if factors.model != digest_of_model(model).hex():
        raise ArtifactError(
            "the factors were fitted on another model (its weights, structure or code differ): "
            "fit them again; in a pipeline run: dvc repro factors"
        )


def digest_of_factors(factors: Factors) -> bytes:
    """Digest factors."""
    digest = hashlib.sha256(f"{factors.tier} {list(factors.layers)}".encode())
    for layer in factors.layers.values():
        for part in vars(layer).values():
            digest.update(part.contiguous().numpy().data)
    return digest.digest()


def digest_of_queries(queries: Queries) -> bytes:
    """Digest queries."""
    digest = hashlib.sha256(str(tuple(queries.images.shape)).encode())
    digest.update(queries.images.contiguous().numpy().data)
    digest.update(queries.labels.contiguous().numpy().data)
    return digest.digest()
