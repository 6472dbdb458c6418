"""Pairwise influence of training rows on queries (Koh & Liang 2017, with EK-FAC curvature)."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from defense.checkpoints import Checkpoint, digest_of_images, release
from defense.compute import batches, timed, trim_memory
from defense.errors import DataError
from defense.influence.digests import digest_of_factors, digest_of_queries, require_own_factors
from defense.influence.forecast import Memory, QueryLoad, ScoreForecast, forecast_scores
from defense.influence.metric import Metric, QuerySide
from defense.influence.network import Network
from defense.influence.orders import balanced
from defense.influence.products import provenance
from defense.influence.task import CLASSIFICATION, Task, cotangents
from defense.method import Method
from defense.records import Factors, ImageSet, Queries

logger = logging.getLogger(__name__)

RELEASE = 64  # steps after which written parts of a matrix on disk leave main memory

Reals = NDArray[np.floating[Any]]  # float32; float64 if the model is


class ScoreSettings(Method):
    """How scores are computed; their precision is that of the factors' tier.

    Attributes:
        batch_size: Rows per step at most; bounds the memory, does not change the result.
        damping: Relative to each layer's mean Lambda (Grosse et al. 2023 use 0.1).
        memory_limit: GiB the process may take; smaller batches and several passes over the
            rows keep to it. None for no limit.
    """

    batch_size: int = Field(64, gt=0)
    damping: float = Field(0.1, gt=0)
    memory_limit: float | None = Field(None, gt=0)


@dataclass(frozen=True)
class Influence:
    """Influence of `n` training rows on `q` queries at `d` dampings, and norms in its metric.

    Attributes:
        margin: ``[d, q, n]``; ``grad measure(q)^T H^-1 grad measure(n)``.
        loss_scale: ``[n]``; ``grad loss = -loss_scale * grad measure`` of every row.
        self_influence: ``[d, n]``; the same of a row with itself; NaN unless asked.
        query_norm: ``[d, q]``; the same of the queries.
    """

    margin: Reals
    loss_scale: Reals
    self_influence: Reals
    query_norm: Reals

    def loss(self) -> Reals:
        """Return the influence of the rows' losses: ``[d, q, n]``.

        It is ``-grad measure(q)^T H^-1 grad loss(n)``, positive if training on row n raises
        the measurement of query q. It lies on disk, like the margins.
        """
        return _filled(self.margin, np.arange(self.margin.shape[1]), self.loss_scale)

    def loss_self_influence(self) -> Reals:
        """Return the influence of every row's loss on itself: ``[d, n]``, never negative."""
        return self.self_influence * self.loss_scale**2

    def relative(self) -> Reals:
        """Influence over the root of the row's own (RelatIF, Barshan et al. 2020).

        Of margin gradients; of loss gradients it is the same wherever ``loss_scale`` has not
        underflowed.

        Raises:
            DataError: Self-influence was not asked for.
        """
        if np.isnan(self.self_influence).any():
            raise DataError("expected self-influence of every row: pass self_influence=True")
        return self.margin / _root(self.self_influence)[:, None]

    def cosine(self) -> Reals:
        """Cosine of query and row in the metric of ``H^-1``: ``[d, q, n]`` in [-1, 1].

        Raises:
            DataError: Self-influence was not asked for.
        """
        return self.relative() / _root(self.query_norm)[:, :, None]


def _root(squares: Reals) -> Reals:
    """Return norms; where a gradient is zero, one that leaves its influence zero."""
    return np.sqrt(np.maximum(squares, np.finfo(squares.dtype).tiny))


def pairwise_scores(
    model: nn.Module,
    factors: Factors,
    queries: Queries,
    images: ImageSet,
    settings: ScoreSettings,
    task: Task = CLASSIFICATION,
    *,
    scratch: Path | None = None,
) -> Reals:
    """Score every training row against every query in one pass over the training set.

    ``score[q, n] = -grad measure(q)^T H^-1 grad loss(n)``: positive if training on row n
    raises the measurement, which for classification is the margin of the query's label. H is
    the damped EK-FAC matrix.

    Args:
        model: The model the factors were fitted on; it stays as it is.
        factors: EK-FAC factors.
        queries: Images and the labels whose margins are differentiated.
        images: The training set.
        settings: Damping, batch size and memory.
        task: Loss of the rows and measurement of the queries.
        scratch: See `compute_influence`.

    Returns:
        float32 ``[q, n]``.

    Raises:
        ArtifactError: The factors belong to another model.
        DataError: There are no rows or no queries.
        DefenseError: The memory limit is too small.
    """
    influence = compute_influence(model, factors, queries, images, settings, task, scratch=scratch)
    return influence.loss()[0]


def compute_influence(
    model: nn.Module,
    factors: Factors,
    queries: Queries,
    images: ImageSet,
    settings: ScoreSettings,
    task: Task = CLASSIFICATION,
    *,
    dampings: tuple[float, ...] = (),
    self_influence: bool = False,
    scratch: Path | None = None,
) -> Influence:
    """Compute margin- and loss-influence at several dampings in one pass.

    Args:
        model: The model the factors were fitted on; it stays as it is.
        factors: EK-FAC factors.
        queries: Images and the labels whose measure is differentiated; equal ones are
            computed once.
        images: The rows to score; ``images.where(mask)`` costs only those rows.
        settings: Damping, batch size and memory.
        task: Measure and loss.
        dampings: Instead of the one in `settings`; all in one pass.
        self_influence: Whether the rows' own norms are computed too, at the cost of rotating
            every row's gradient.
        scratch: Folder for the checkpoint that makes a killed computation resumable, to be
            deleted when the result is written.

    Raises:
        ArtifactError: The factors belong to another model.
        DataError: There are no rows or no queries.
        DefenseError: The memory limit is too small.
    """
    if not len(images) or not len(queries.labels):
        raise DataError(
            f"expected rows to score and queries, got {len(images)} and {len(queries.labels)}"
        )
    network = Network(model, factors.excluded)
    require_own_factors(factors, model)
    used = dampings or (settings.damping,)

    def key() -> Iterator[bytes]:
        yield from (bytes.fromhex(factors.model), digest_of_images(images))
        yield from (digest_of_factors(factors), digest_of_queries(queries))
        yield settings.model_dump_json().encode()
        yield f"{used} {self_influence}".encode()
        yield from (task.digest(), provenance(network.place))

    metric = Metric(factors, used, network.place, network.dtype)
    unique, back = _distinct(queries)
    memory = Memory(settings.batch_size, settings.memory_limit)
    held = QueryLoad(len(unique), len(used), metric.dtype.itemsize, self_influence)
    forecast = forecast_scores(network, images, held, memory)
    logger.info("%s", forecast)
    checkpoint = Checkpoint.at(scratch, key())
    scorer = _Scorer(network, metric, task, images, len(unique), forecast, norms=self_influence)
    margin, norms = scorer.run(queries.images[unique], queries.labels[unique], checkpoint)
    if len(unique) < len(back):
        margin = _filled(margin, back)
    return Influence(margin, scorer.scale, scorer.own, norms[:, back])


def _filled(margin: Reals, queries: NDArray[np.int64], scale: Reals | None = None) -> NDArray[Any]:
    """Copy some queries of ``[d, q, n]``, scaled by row if asked, from disk to disk."""
    size = len(margin), len(queries), margin.shape[2]
    result = Checkpoint(None).array(size, margin.dtype)
    for place, query in enumerate(queries):
        row = margin[:, query]
        result[:, place] = row if scale is None else row * scale
        if place % RELEASE == 0:
            release(result)
            release(margin)  # what is read stays, too
    result.setflags(write=False)
    return result


def _distinct(queries: Queries) -> tuple[Tensor, NDArray[np.int64]]:
    """Find one query of every (image, label), and which of them each query equals."""
    seen: dict[tuple[bytes, int], int] = {}
    first: list[int] = []
    back: list[int] = []
    for number, (image, label) in enumerate(zip(queries.images, queries.labels, strict=True)):
        key = hashlib.sha256(image.contiguous().numpy().data).digest(), int(label)
        if key not in seen:
            seen[key] = len(first)
            first.append(number)
        back.append(seen[key])
    return torch.tensor(first), np.array(back)


class _Scorer:
    """The passes over the rows, with what they share."""

    def __init__(
        self,
        network: Network,
        metric: Metric,
        task: Task,
        images: ImageSet,
        num_queries: int,
        plan: ScoreForecast,
        *,
        norms: bool,
    ) -> None:
        self.network, self.metric, self.task = network, metric, task
        self.images, self.norms = images, norms
        self.frames, self.shapes = plan.frames, plan.shapes
        self.batch_size, self.num_passes = plan.batch_size, plan.num_passes
        kind = np.dtype(np.float64 if network.dtype == torch.float64 else np.float32)
        self.scale: Reals = np.zeros(len(images), dtype=kind)
        self.own: Reals = np.full((len(metric.dampings), len(images)), np.nan, dtype=kind)
        self.query_norms: Reals = np.zeros((len(metric.dampings), num_queries), dtype=kind)

    def run(self, images: Tensor, labels: Tensor, checkpoint: Checkpoint) -> tuple[Reals, Reals]:
        """Score all queries, in groups if they do not fit: ``[d, q, n]`` and ``[d, q]``."""
        count = len(labels)
        size = *self.query_norms.shape, len(self.images)
        margin = checkpoint.array(size, self.scale.dtype)
        current, row = self._resume(checkpoint)
        for number, group in enumerate(balanced(count, -(-count // self.num_passes))):
            if number < current:
                continue
            with timed("queries"):
                side = self.query_side(images[group], labels[group])
            self.query_norms[:, group] = side.norms.cpu().numpy()
            first = row if number == current else 0
            with timed("rows"):
                self.rows_side(margin[:, group], side, first, number, checkpoint)
            del side  # before the next group takes its place
        margin.setflags(write=False)  # it may be the file a killed computation continues from
        return margin, self.query_norms

    def _resume(self, checkpoint: Checkpoint) -> tuple[int, int]:
        """Take over a checkpoint and its plan; returns the pass and the row it was at."""
        state = checkpoint.load()
        if state is None:
            return 0, 0
        self.batch_size, self.num_passes = state["batch_size"], state["num_passes"]
        self.scale, self.own = state["scale"].numpy(), state["own"].numpy()
        self.query_norms = state["query_norms"].numpy()
        return state["pass"], state["row"]

    def query_side(self, images: Tensor, labels: Tensor) -> QuerySide:
        """Precondition the measure gradients of some queries."""
        side = QuerySide(self.metric, len(labels), self.batch_size, self.frames, self.shapes)
        for rows in batches(len(labels), self.batch_size, label="queries"):
            outputs = self.network.outputs(images[rows])
            wanted = labels[rows].to(self.network.place)
            cotangent = cotangents(self.task.measure, outputs, wanted)
            self.network.backward(outputs, cotangent, partial(side.put, int(rows[0])))
        trim_memory()
        return side

    def rows_side(
        self,
        margin: Any,
        side: QuerySide,
        first: int,
        number: int,
        checkpoint: Checkpoint,
    ) -> None:
        """Contract the measure gradients of the rows with a group of queries."""
        norms_wanted = self.norms and number == 0
        for rows in batches(len(self.images), self.batch_size, label="scores", first=first):
            outputs, targets = self.network.rows(self.images, rows)
            self.scale[rows] = self.task.loss_scale(outputs.detach(), targets).cpu().numpy()
            block = torch.zeros(len(side), len(rows), dtype=self.network.dtype).to(outputs.device)
            norms = block.new_zeros(len(self.metric.dampings), len(rows))
            visit = partial(side.contract, block, norms if norms_wanted else None)
            cotangent = cotangents(self.task.measure, outputs, targets)
            self.network.backward(outputs, cotangent, visit)
            margin[:, :, rows] = block.view(*margin.shape[:2], -1).cpu().numpy()
            if int(rows[0]) // self.batch_size % RELEASE == 0:
                release(margin)
            if norms_wanted:
                self.own[:, rows] = norms.cpu().numpy()
            self._save(checkpoint, margin, number, int(rows[-1]) + 1)

    def _save(self, checkpoint: Checkpoint, margin: Any, number: int, row: int) -> None:
        if checkpoint.due():
            margin.flush()
            known = {"scale": self.scale, "own": self.own, "query_norms": self.query_norms}
            parts = {name: torch.from_numpy(values) for name, values in known.items()}
            plan = {"batch_size": self.batch_size, "num_passes": self.num_passes}
            checkpoint.save({"pass": number, "row": row, **plan, **parts})
