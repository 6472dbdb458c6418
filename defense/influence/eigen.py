"""The symmetric eigenproblem, checked."""

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from defense.errors import NumericalError
from defense.influence.products import product

SINGLE_FROM = 1024  # width from which float32 is tried first
ORTHOGONAL = 1e-4  # how far V^T V may take a unit vector
LEADING = 32  # eigenvectors that are found before the others
ITERATIONS = 10  # of the subspace they are found in
RESIDUAL = 1e-5  # of a leading eigenvector, relative to the largest eigenvalue
LEVEL = 1.5  # times the smallest leading eigenvalue, to which the others are brought
FAILURES = (RuntimeError, ValueError, np.linalg.LinAlgError)  # of CUDA, scipy, numpy
PROBES = 8  # random vectors that is tried on


def eigenvectors(name: str, side: str, matrix: Tensor) -> Tensor:
    """Return the eigenvectors of covariances, in columns.

    EK-FAC holds in any orthonormal basis, so what matters is that the basis is orthonormal.
    Wide matrices are therefore solved in float32, twice as fast, and again in float64 if the
    result is not orthonormal. On the CPU wide matrices go to the LAPACK of scipy (float32) and
    numpy (float64, whose 64-bit integers have no limit on the workspace); narrow ones to that
    of torch, which does not have to wake threads of its own.

    Args:
        name: The layer, for errors.
        side: ``activation`` or ``gradient``, for errors.
        matrix: ``[g, d, d]``; symmetrised here.

    Returns:
        float32 ``[g, d, d]`` on the device of `matrix`; float64 if `matrix` is.

    Raises:
        NumericalError: The matrix is not finite, or has no decomposition.
    """
    if not matrix.isfinite().all():
        raise NumericalError(
            f"the {side} covariance of layer {name} is not finite: the model's weights or "
            f"activations overflow; add '{name}' to factors.exclude to leave it out"
        )
    kept = matrix.dtype if matrix.dtype == torch.float64 else torch.float32
    parts = [_solve(name, side, (part + part.T) / 2) for part in matrix]
    return (torch.stack(parts) if len(parts) > 1 else parts[0][None]).to(kept)


def _solve(name: str, side: str, matrix: Tensor) -> Tensor:
    if matrix.dtype == torch.float32 and len(matrix) >= SINGLE_FROM:
        vectors = _single(matrix)
        if vectors is not None:
            return vectors
    try:
        return _decompose(matrix.double())
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        if matrix.device.type != "cpu":  # whose solver may fail where LAPACK does not
            return _solve(name, side, matrix.cpu()).to(matrix.device)
        raise NumericalError(
            f"the eigendecomposition of the {side} covariance of layer {name} ({len(matrix)} "
            f"wide) failed ({error}); fit the factors on more rows, or add '{name}' to "
            "factors.exclude to leave it out"
        ) from error


def _single(matrix: Tensor) -> Tensor | None:
    """Solve in float32; None if that fails or the result is not orthonormal.

    The solver errs by a share of the largest eigenvalue, which mixes eigenvectors of small
    ones. So the leading ones are found first and brought down to the size of the next.
    """
    try:
        values, leading = _leading(matrix)
        lower = leading * (values - LEVEL * values[:1])
        deflated = matrix - product(lower, leading) if len(values) else matrix.clone()
        rows = _decompose(deflated).T  # as they lie in memory
    except torch.OutOfMemoryError:
        raise
    except FAILURES:
        return None
    if len(values):
        rest = rows[: -len(values)]  # the last ones span the leading ones
        rest -= product(product(rest, leading.T), leading)
        rows[len(rest) :] = leading.T
    return rows.T if _departure(rows.T) < ORTHOGONAL else None


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Find the largest eigenvalues, ascending, and their vectors by subspace iteration.

    Those that have not converged, and any below them, are left out.
    """
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(matrix), 2 * LEADING, generator=generator).to(matrix)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(product(matrix, basis.T)).Q
    values, turn = torch.linalg.eigh(basis.T @ matrix @ basis)
    values, vectors = values[-LEADING:], basis @ turn[:, -LEADING:]
    residual = (matrix @ vectors - vectors * values).norm(dim=0)
    failed = (residual > RESIDUAL * values[-1]).nonzero()
    first = int(failed[-1]) + 1 if len(failed) else 0
    return values[first:], vectors[:, first:]


def _decompose(matrix: Tensor) -> Tensor:
    if matrix.device.type != "cpu" or len(matrix) < SINGLE_FROM:
        return torch.linalg.eigh(matrix).eigenvectors
    if matrix.dtype == torch.float64:
        return torch.from_numpy(np.linalg.eigh(matrix.numpy()).eigenvectors)
    _, vectors = scipy.linalg.eigh(
        matrix.numpy().T, driver="evd", check_finite=False, overwrite_a=True
    )  # the transpose lies in memory as LAPACK wants it, so nothing is copied
    return torch.from_numpy(vectors)


def _departure(vectors: Tensor) -> float:
    """Measure how far ``V^T V`` takes random unit vectors; NaN counts as infinite."""
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(len(vectors), PROBES, generator=generator).to(vectors)
    probes /= probes.norm(dim=0)
    change = vectors.T @ (vectors @ probes) - probes
    return float(change.norm(dim=0).max().nan_to_num(torch.inf))
