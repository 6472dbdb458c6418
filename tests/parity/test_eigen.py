"""The eigenproblem: orthonormal, close to float64, and never silently wrong."""

import pytest
import torch
from torch import Tensor

from defense.errors import NumericalError
from defense.influence import eigen
from defense.influence.eigen import eigenvectors

WIDTH = 1100  # wide enough for float32


def matrix_of(spectrum: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = len(spectrum), len(spectrum)
    basis = torch.linalg.qr(torch.randn(size, generator=generator, dtype=torch.float64)).Q
    return ((basis * spectrum.double()) @ basis.T).float()[None]


def mixing(vectors: Tensor, matrix: Tensor) -> float:
    """Root mean square of what is off the diagonal, relative to the diagonal."""
    turned = vectors.double().T @ matrix.double() @ vectors.double()
    size = turned.diagonal().abs().sqrt()
    rest = turned / size / size[:, None]
    return float(rest.fill_diagonal_(0).square().mean().sqrt())


def departure(vectors: Tensor) -> float:
    return float((vectors.T @ vectors - torch.eye(len(vectors)).to(vectors)).abs().max())


SPECTRA = {
    "steep": torch.logspace(0, -6, WIDTH),
    "one large": torch.cat([torch.tensor([1e3]), torch.linspace(1, 0.1, WIDTH - 1)]),
    "flat": torch.ones(WIDTH),
    "low rank": torch.cat([torch.ones(10), torch.zeros(WIDTH - 10)]),
    "zero": torch.zeros(WIDTH),
}


@pytest.mark.parametrize("kind", SPECTRA)
def test_vectors_are_orthonormal_and_diagonalise(kind: str) -> None:
    matrix = matrix_of(SPECTRA[kind])
    (vectors,) = eigenvectors("layer", "activation", matrix)
    assert vectors.dtype == torch.float32
    assert departure(vectors) < 1e-4
    turned = vectors.T @ matrix[0] @ vectors
    rest = turned - torch.diag(turned.diagonal())
    assert rest.abs().max() <= 1e-4 * matrix.abs().max()


def test_small_eigenvalues_are_mixed_less_than_by_the_solver_alone() -> None:
    ranks = torch.arange(1, WIDTH + 1)
    matrix = matrix_of(ranks.float() ** -1.5)  # as covariances of patches fall off
    (vectors,) = eigenvectors("layer", "activation", matrix)
    plain = eigen._decompose(matrix[0].clone())
    assert mixing(vectors, matrix[0]) < mixing(plain, matrix[0]) / 5


def test_what_is_not_orthonormal_is_solved_in_float64(monkeypatch) -> None:
    matrix = matrix_of(SPECTRA["steep"])
    (expected,) = torch.linalg.eigh(matrix[0].double()).eigenvectors[None].float()
    solved = []
    original = eigen._decompose

    def decompose(part: Tensor) -> Tensor:
        solved.append(part.dtype)
        vectors = original(part)
        return vectors * 1.01 if part.dtype == torch.float32 else vectors

    monkeypatch.setattr(eigen, "_decompose", decompose)
    (vectors,) = eigenvectors("layer", "activation", matrix)
    assert solved == [torch.float32, torch.float64]
    assert mixing(vectors, matrix[0]) < 1.5 * mixing(expected, matrix[0])


@pytest.mark.parametrize("part", ["_leading", "_decompose"])
def test_what_float32_cannot_solve_is_solved_in_float64(part: str, monkeypatch) -> None:
    matrix, original = matrix_of(SPECTRA["steep"]), getattr(eigen, part)

    def fail(matrix: Tensor) -> Tensor:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("no convergence")
        return original(matrix)

    monkeypatch.setattr(eigen, part, fail)
    (vectors,) = eigenvectors("layer", "activation", matrix)
    assert departure(vectors) < 1e-4


def test_what_nothing_can_solve_names_the_layer(monkeypatch) -> None:
    def fail(matrix: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(eigen, "_decompose", fail)
    message = r"gradient covariance of layer conv7 \(4 wide\) failed \(no convergence\)"
    with pytest.raises(NumericalError, match=message):
        eigenvectors("conv7", "gradient", torch.eye(4)[None])


def test_a_matrix_that_is_not_finite_names_the_layer() -> None:
    matrix = torch.eye(4)[None].clone()
    matrix[0, 1, 2] = torch.nan
    with pytest.raises(NumericalError, match="gradient covariance of layer conv7 is not finite"):
        eigenvectors("conv7", "gradient", matrix)
