"""kronfluence, measured with its own defaults on the problem of `benchmarks.ekfac`."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from defense.influence.task import CLASSIFICATION
from defense.records import ImageSet, Queries


class Peer(Task):
    """Cross-entropy of given labels, or of the labels drawn beforehand; measured by the margin.

    Losses are taken in float64, because in float32 the gradient of a perfectly fitted row,
    ``p - 1``, is rounded to multiples of 6e-8.
    """

    def compute_train_loss(
        self, batch: tuple[Tensor, ...], model: nn.Module, sample: bool = False
    ) -> Tensor:
        """Sum the loss of a batch ``(images, labels, drawn labels)``."""
        images, labels, drawn = batch
        outputs = model(images).double()
        return F.cross_entropy(outputs, drawn if sample else labels, reduction="sum")

    def compute_measurement(self, batch: tuple[Tensor, ...], model: nn.Module) -> Tensor:
        """Sum the negative margins of a batch ``(images, labels)``."""
        return -CLASSIFICATION.measure(model(batch[0]), batch[1]).sum()


def measure_peer(
    model: nn.Module,
    rows: ImageSet,
    drawn: Tensor,
    queries: Queries,
    batch_size: int,
    result: Path,
) -> dict[str, Any]:
    """Fit factors and score, all queries in one pass; keeps the scores in `result`."""
    train = TensorDataset(rows.images(), rows.targets(), drawn)
    asked = TensorDataset(queries.images, queries.labels)
    prepared = prepare_model(copy.deepcopy(model), Peer())
    place = str(result.parent / "kronfluence")
    analyzer = Analyzer("peer", prepared, Peer(), cpu=True, output_dir=place, disable_tqdm=True)
    options: dict[str, Any] = {
        "factor_args": FactorArguments(strategy="ekfac"),
        "overwrite_output_dir": True,
    }
    seconds = {
        "covariances": _time(
            lambda: analyzer.fit_covariance_matrices(
                "factors", train, per_device_batch_size=batch_size, **options
            )
        ),
        "eigendecompositions": _time(
            lambda: analyzer.perform_eigendecomposition("factors", **options)
        ),
        "lambda": _time(
            lambda: analyzer.fit_lambda_matrices(
                "factors", train, per_device_batch_size=batch_size, **options
            )
        ),
        "scores": _time(
            lambda: analyzer.compute_pairwise_scores(
                "scores",
                "factors",
                asked,
                train,
                per_device_query_batch_size=len(asked),
                per_device_train_batch_size=batch_size,
                score_args=ScoreArguments(damping_factor=None),  # 0.1 times the mean Lambda
                overwrite_output_dir=True,
            )
        ),
    }
    scores = analyzer.load_pairwise_scores("scores")["all_modules"].to(torch.float32)
    np.save(result, scores.numpy())
    return seconds | {"total": sum(seconds.values())}


def _time(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
