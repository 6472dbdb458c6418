"""EK-FAC factors (George et al. 2018, section 3; Grosse et al. 2023, section 2.2)."""

import logging
import math
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from defense.checkpoints import Checkpoint, digest_of_images, digest_of_model
from defense.compute import batches, placed, progress, timed
from defense.errors import DataError, NumericalError
from defense.influence.contraction import Basis, add_squares
from defense.influence.covariance import Covariance, covariance, shifted_size
from defense.influence.eigen import eigenvectors
from defense.influence.faithful import require_faithful
from defense.influence.forecast import Memory, forecast_factors
from defense.influence.layers import Trace, coverage
from defense.influence.network import Network
from defense.influence.orders import cheapest_squares
from defense.influence.products import Workspace, heavy_dtype, provenance
from defense.influence.task import CLASSIFICATION, Task, cotangents
from defense.influence.weighing import drawn, drawn_by_weight, heaviest, nudged, squared
from defense.method import Method
from defense.records import Factors, ImageSet, LayerFactors, Tier

logger = logging.getLogger(__name__)

Side = Literal["activation", "gradient"]
SIDES: tuple[Side, Side] = ("activation", "gradient")

SAMPLE = 32  # rows left out on which the error is estimated


class FactorSettings(Method):
    """How the curvature is estimated.

    Attributes:
        tier: ``exact`` uses every row for everything, in float32. ``fast`` takes the rows whose
            labels surprise the model most, until the others hold less than `tolerance` of the
            squared loss gradients, and multiplies in bfloat16, where the hardware does and the
            result bears it.
        tolerance: Share of the squared loss gradients, with respect to the model's outputs,
            that the rows left out by ``fast`` may hold.
        batch_size: Rows per step at most; bounds the memory, does not change the result.
        memory_limit: GiB the process may take; None for no limit.
        fisher: ``sampled`` draws labels from the model (the true Fisher, equal to the
            Gauss-Newton matrix of cross-entropy); ``empirical`` uses the training labels.
        max_rows: Rows to fit on, drawn at random; None for all.
        exclude: Names of modules whose parameters are left out, and of parameters, where
            the error that refuses a model names these.
    """

    tier: Tier = "fast"
    tolerance: float = Field(1e-3, gt=0, lt=1)
    batch_size: int = Field(64, gt=0)
    memory_limit: float | None = Field(None, gt=0)
    fisher: Literal["sampled", "empirical"] = "sampled"
    max_rows: int | None = Field(None, gt=0)
    exclude: tuple[str, ...] = ()


def fit_factors(
    model: nn.Module,
    images: ImageSet,
    settings: FactorSettings,
    generator: torch.Generator,
    task: Task = CLASSIFICATION,
    *,
    scratch: Path | None = None,
) -> Factors:
    """Fit the factors of every linear and convolution layer.

    First the covariances of activations and of output gradients are summed, whose
    eigenvectors span the Kronecker basis; then the mean squared per-sample gradient is taken
    in that basis, the eigenvalue correction.

    Args:
        model: The suspect model; it stays as it is.
        images: The training set.
        settings: How to estimate.
        generator: Draws one label per row.
        task: Loss and label distribution of the model.
        scratch: Folder for the checkpoint that makes a killed fit resumable, to be deleted when
            the result is written.

    Returns:
        Factors on the CPU, float32.

    Raises:
        DataError: There are no rows.
        UnsupportedLayerError: The model has a layer that cannot be treated.
        NumericalError: A layer's covariance is not finite, cannot be decomposed, or its
            Lambda is zero or not finite.
        DefenseError: The memory limit is too small.
    """
    if not len(images):
        raise DataError("expected rows to fit the factors on, got none")
    images, draws = drawn(images, settings.max_rows, generator)
    network = Network(model, settings.exclude)
    require_faithful(network, images)
    memory = Memory(settings.batch_size, settings.memory_limit)
    forecast = forecast_factors(network, images, settings.tier, memory)
    logger.info("%s", forecast)
    origin = digest_of_model(model)
    fit = _Fit(model, network, images, settings, draws, task, forecast.batch_size)
    fit.resume(Checkpoint.at(scratch, fit.key(origin)))
    layers = fit.run()
    covered = coverage(model, layers)
    return Factors(
        layers,
        len(images),
        origin.hex(),
        covered,
        settings.tier,
        len(fit.rows),
        float(fit.rest.sum()) / (float(fit.weights.sum()) or 1.0),
        fit.error,
        settings.exclude,
    )


class _Fit:
    """The passes over the data, with what they share and what a checkpoint holds."""

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        images: ImageSet,
        settings: FactorSettings,
        draws: Tensor,
        task: Task,
        batch_size: int,
    ) -> None:
        self.model, self.network = model, network
        self.images, self.settings = images, settings
        self.draws, self.task, self.batch_size = draws, task, batch_size
        self.space = Workspace()
        self.checkpoint = Checkpoint(None)
        self.done: dict[str, int] = {}
        self.rows = np.arange(len(images))
        self.weights = torch.zeros(len(images), dtype=torch.float64)  # of labels as drawn
        self.bounds = torch.zeros_like(self.weights)  # the largest of nudged draws
        self.rest = torch.zeros_like(self.weights)  # of the rows left out
        self.error = 0.0
        self.sums: dict[str, Covariance] = {}
        self.bases: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    def key(self, origin: bytes) -> Iterable[bytes]:
        """Yield everything the result depends on, given the digest of the model."""
        yield origin
        yield digest_of_images(self.images)
        yield self.settings.model_dump_json().encode()
        yield self.task.digest()
        yield provenance(self.network.place)
        yield self.draws.numpy().tobytes()

    def run(self) -> dict[str, LayerFactors]:
        """Run what the checkpoint does not hold yet."""
        with timed("covariances"):
            if self.settings.tier == "exact":
                self.covariances()
            else:
                self.activation_covariances()
                self.leave_out(self.settings.tolerance)
                self.gradient_covariances()
        with timed("eigendecompositions"):
            self.decompose()
        with timed("lambda"):
            self.lambdas()
        return {
            name: LayerFactors(
                self.bases[f"{name}:activation"].cpu(),
                self.bases[f"{name}:gradient"].cpu(),
                self._mean_square(name, self.squares[name]).cpu(),
            )
            for name in self.network.tape.order
            if name in self.squares
        }

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, and keep it up to date."""
        self.checkpoint, state = checkpoint, checkpoint.load()
        if state is not None:
            place = self.network.place
            self.batch_size = state["batch_size"]
            self.done, (self.weights, self.bounds) = state["done"], state["weights"]
            for key, parts in state["covariances"].items():
                name, side = key.rsplit(":", 1)
                self.sums[key] = covariance(self.network.layers[name], side, state["sizes"][key])
                self.sums[key].parts = placed(parts, place)
            self.bases = placed(state["bases"], place)
            self.squares = placed(state["squares"], place)

    def save(self) -> None:
        """Save everything that has been summed, if it is time to."""
        self.checkpoint.save(
            {
                "batch_size": self.batch_size,
                "done": self.done,
                "weights": [self.weights, self.bounds],
                "covariances": {key: sums.parts for key, sums in self.sums.items()},
                "sizes": {key: sums.size for key, sums in self.sums.items()},
                "bases": self.bases,
                "squares": self.squares,
            }
        )

    def steps(self, label: str) -> Iterator[NDArray[np.int64]]:
        """Yield the rows in use that a pass has not seen yet, in batches."""
        first = self.done.get(label, 0)
        for places in batches(len(self.rows), self.batch_size, label=label, first=first):
            yield self.rows[places]
            self.done[label] = int(places[-1]) + 1
            self.save()

    def outputs(self, network: Network, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Run a batch: outputs, and gradients of the loss the Fisher matrix is made of."""
        outputs, targets = network.rows(self.images, rows)
        return outputs, self.slopes(outputs, targets, self.draws[torch.from_numpy(rows)])

    def slopes(self, outputs: Tensor, targets: Tensor, draws: Tensor) -> Tensor:
        """Differentiate the loss of targets that are drawn, unless the Fisher is empirical."""
        if self.settings.fisher == "sampled":
            targets = self.task.sample(outputs.detach(), draws.to(outputs.device))
        return cotangents(self.task.loss, outputs, targets)

    def add(self, name: str, side: Side, trace: Trace, dtype: torch.dtype) -> None:
        """Add a batch to the covariance of one side of a layer."""
        key = f"{name}:{side}"
        if key not in self.sums:
            size = shifted_size(trace) if side == "activation" else None
            self.sums[key] = covariance(trace.layer, side, size)
        self.sums[key].add(trace, dtype, self.space)

    def covariances(self) -> None:
        """Sum the uncentred covariances of both sides in one pass."""

        def visit(name: str, trace: Trace) -> None:
            for side in SIDES:
                self.add(name, side, trace, trace.x.dtype)

        for rows in self.steps("covariances"):
            self.network.backward(*self.outputs(self.network, rows), visit)

    def activation_covariances(self) -> None:
        """Sum the activation side in forward passes, and weigh every row.

        They only choose a basis and rows, so that the network may run in bfloat16, too.
        """
        dtype = heavy_dtype(self.network.place)
        network = Network(self.model, self.settings.exclude, dtype)
        for rows in self.steps("activations"):
            with torch.no_grad():
                self.weigh(network, rows)
                network.forward(lambda name, trace: self.add(name, "activation", trace, dtype))

    def weigh(self, network: Network, rows: NDArray[np.int64]) -> None:
        """Note the squared loss gradients of rows, and the largest of them for nudged draws."""
        outputs, targets = network.rows(self.images, rows)
        draws = self.draws[torch.from_numpy(rows)]
        several = nudged(draws) if self.settings.fisher == "sampled" else [draws]
        found = [squared(self.slopes(outputs, targets, numbers)) for numbers in several]
        self.weights[rows] = found[0]
        self.bounds[rows] = torch.stack(found).amax(0)

    def leave_out(self, tolerance: float) -> None:
        """Keep the rows with the largest loss gradients that hold all but `tolerance` of them.

        Everything that is left to sum is linear in the squared gradient of a row, and a row
        the model is sure of has next to none. A row that would weigh much with a nudged draw
        is kept, because only the network in full precision says which label it draws.
        """
        self.rows = heaviest(self.bounds, tolerance * float(self.weights.sum()))
        self.rest = self.weights.clone()
        self.rest[self.rows] = 0

    def gradient_covariances(self) -> None:
        """Sum the output gradients' side."""

        def visit(name: str, trace: Trace) -> None:
            self.add(name, "gradient", trace, trace.x.dtype)

        for rows in self.steps("gradients"):
            self.network.backward(*self.outputs(self.network, rows), visit)

    def decompose(self) -> None:
        """Find the eigenvectors of both sides of every layer, dropping the covariances."""
        for key in progress(iterable=list(self.sums), desc="eigendecompositions", unit="matrix"):
            name, side = key.rsplit(":", 1)
            self.bases[key] = eigenvectors(name, side, self.sums.pop(key).total())
            self.save()

    def lambdas(self) -> None:
        """Sum the squared per-sample gradients in the eigenbasis, ``[g, o, i]``, by layer."""
        turned: dict[str, Basis] = {}
        visit = partial(self.square, self.squares, turned)
        for rows in self.steps("lambda"):
            self.network.backward(*self.outputs(self.network, rows), visit)
        self.error = self.unseen(turned)

    def square(
        self, sums: dict[str, Tensor], turned: dict[str, Basis], name: str, trace: Trace
    ) -> None:
        """Add the squared gradients of a layer to its sum, turning them by its basis."""
        shape, dtype, place = trace.shape, trace.x.dtype, trace.x.device
        if name not in turned:
            activation, gradient = (self.bases[f"{name}:{side}"] for side in SIDES)
            turned[name] = Basis.of(activation, gradient, place, dtype)
        if name not in sums:
            size = shape.groups, shape.outputs, shape.inputs
            sums[name] = torch.zeros(size, dtype=dtype, device=place)
        add_squares(sums[name], trace, turned[name], cheapest_squares(shape), dtype, self.space)

    def unseen(self, turned: dict[str, Basis]) -> float:
        """Estimate the largest share of a layer's Lambda that the rows left out hold.

        Some of them, drawn with odds of their weights, stand for all.
        """
        picks = drawn_by_weight(self.rest, SAMPLE)
        sums: dict[str, Tensor] = {}
        for start in range(0, len(picks), self.batch_size):
            rows = picks[start : start + self.batch_size]
            outputs, slopes = self.outputs(self.network, rows)
            scale = (self.rest.sum() / (SAMPLE * self.rest[rows])).sqrt().to(slopes)[:, None]
            self.network.backward(outputs, slopes * scale, partial(self.square, sums, turned))
        known = {name: float(self.squares[name].sum()) for name in sums}
        found = {name: float(total.sum()) for name, total in sums.items()}
        return max((found[name] / (found[name] + known[name]) for name in found), default=0.0)

    def _mean_square(self, name: str, total: Tensor) -> Tensor:
        if not 0 < float(total.sum()) < math.inf:
            raise NumericalError(
                f"expected a positive, finite Lambda for layer {name}, got a sum of "
                f"{float(total.sum())}: the layer is dead, or the model is certain of every "
                f"label; add '{name}' to factors.exclude, or set factors.fisher: empirical"
            )
        return total / len(self.images)
