"""Figures of `benchmarks.ekfac`, derived from what every tool took."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.record import figure

SIZES = (256, 1024, 4096)
FEW, MANY = 256, 1024  # rows between which slopes are taken, for both tools
PEER_SIZES = {"resnet18": (FEW, MANY), "resnet9": SIZES}  # where it takes less than 20 minutes
BATCH_SIZE = 64
COMPARED = MANY  # rows at which both tools are run several times, by turns
REPEATS = 3

Results = dict[str, dict[str, Any]]
Figures = list[dict[str, Any]]


def steps(result: dict[str, Any], phase: str) -> float:
    """Time of a phase in training steps that were timed before and after it."""
    return float(result[phase] / result["step"])


def slope(results: Results, tool: str, phase: str, few: int = FEW, many: int = MANY) -> float:
    """Training steps of one more batch in a phase, from two numbers of rows."""
    first, second = (steps(results[f"{tool}-{count}"], phase) for count in (few, many))
    return (second - first) / (many - few) * BATCH_SIZE


def per_row(result: dict[str, Any], phase: str, count: int) -> float:
    """Training steps per batch of a phase."""
    return steps(result, phase) / count * BATCH_SIZE


def agreement(folder: Path, one: str, other: str) -> dict[str, float]:
    """Compare two score matrices ``[q, n]``: over all entries, and the top 1 % of rows."""
    a, b = (np.load(folder / f"{name}.npy") for name in (one, other))
    top = max(1, a.shape[1] // 100)
    shared = [
        len(np.intersect1d(leaders(x, top), leaders(y, top))) for x, y in zip(a, b, strict=True)
    ]
    return {
        "pearson": pearson(a, b),
        "spearman": float(spearmanr(a.ravel(), b.ravel()).statistic),
        "top1_overlap": float(np.mean(shared)) / top,
    }


def pearson(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Correlate all entries of two matrices."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def leaders(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Rows with the largest scores."""
    return np.argsort(-scores, kind="stable")[:count]


def peer_total(results: Results, count: int) -> float:
    """Training steps the peer takes in all; extrapolated linearly if it was not run."""
    if f"kronfluence-{count}" in results:
        return steps(results[f"kronfluence-{count}"], "total")
    grow = ("covariances", "lambda", "scores")
    each = sum(slope(results, "kronfluence", phase) for phase in grow) / BATCH_SIZE
    return steps(results[f"kronfluence-{MANY}"], "total") + each * (count - MANY)


def figures_of(name: str, results: Results, folder: Path) -> tuple[Figures, dict[str, Any]]:
    """Derive the figures of one network, and the peer's numbers beside them."""
    peer = peer_costs(results)
    rows = [*costs(results, peer), *agreements(folder), *row_store(results, folder)]
    details = {"peer": peer, "ours": own_costs(results), "runs": results}
    return [row | {"id": f"{name}_{row['id']}"} for row in rows], details


def fixed_steps(results: Results, tool: str) -> float:
    """Eigenproblems, and what of the scores does not grow with the rows, in training steps."""
    run = results[f"{tool}-{MANY}"]
    growing = slope(results, tool, "scores") * MANY / BATCH_SIZE
    return steps(run, "eigendecompositions") + steps(run, "scores") - growing


def peer_costs(results: Results) -> dict[str, float]:
    """What kronfluence takes: per row at 1,024 rows, and in all, in training steps.

    ``small_batch_time`` and ``small_batch_memory`` say what a batch of 16 takes of that.
    """
    run, small = results[f"kronfluence-{MANY}"], results[f"kronfluence-{FEW}-small-batch"]
    usual = results[f"kronfluence-{FEW}"]
    return {
        "covariance_steps": per_row(run, "covariances", MANY),
        "lambda_steps": per_row(run, "lambda", MANY),
        "scores_steps": slope(results, "kronfluence", "scores"),
        "fixed_steps": fixed_steps(results, "kronfluence"),
        "small_batch_time": steps(small, "total") / steps(usual, "total"),
        "small_batch_memory": small["peak_gib"] / usual["peak_gib"],
        "total_seconds_1024": statistics.median(totals(results, "kronfluence")),
        "total_steps_4096": peer_total(results, max(SIZES)),
    }


def own_costs(results: Results) -> dict[str, Any]:
    """What is told of `exact` beside the figures."""
    most = max(SIZES)
    return {
        "scores_steps_1024_to_4096": slope(results, "exact", "scores", MANY, most),
        "fixed_steps": fixed_steps(results, "exact"),
        "forecast_over_actual": {
            f"{tier}_{count}": run["forecast"] / run["total"]
            for tier in ("exact", "fast")
            for count in SIZES
            for run in [results[f"{tier}-{count}"]]
        },
    }


def totals(results: Results, tool: str) -> list[float]:
    """Seconds of a tool's runs at 1,024 rows, in the order they were made."""
    keys = [f"{tool}-{COMPARED}", *(f"{tool}-{COMPARED}-run{n}" for n in range(2, REPEATS + 1))]
    return [results[key]["total"] for key in keys]


def costs(results: Results, peer: dict[str, float]) -> Figures:
    """Time and memory."""
    most = max(SIZES)
    exact, fast, theirs = (results[key] for key in ("exact-1024", "fast-4096", "kronfluence-1024"))
    growth = steps(results["exact-4096"], "total") / steps(exact, "total")
    memory = {tier: results[f"{tier}-1024"]["peak_gib"] for tier in ("fast", "exact")}
    pairs = zip(totals(results, "kronfluence"), totals(results, "exact"), strict=True)
    ratios = [other / ours for other, ours in pairs]
    return [
        figure("covariance_steps", [per_row(exact, "covariances", 1024)], "<=", 2.5),
        figure("lambda_steps", [per_row(exact, "lambda", 1024)], "<=", 4.5),
        figure("scores_steps", [slope(results, "exact", "scores")], "<=", 2.5),
        figure("fixed_ratio", [fixed_steps(results, "exact") / peer["fixed_steps"]], "<=", 1 / 3),
        figure("exact_speedup", ratios, ">=", 8),
        figure("fast_epochs", [per_row(fast, "total", most)], "<=", 4),
        figure("fast_speedup", [peer["total_steps_4096"] / steps(fast, "total")], ">=", 20),
        figure("memory_ratio", [memory["fast"] / theirs["peak_gib"]], "<=", 0.5),
        figure("exact_memory_ratio", [memory["exact"] / theirs["peak_gib"]], "<=", 0.5),
        figure("growth", [growth], "<=", 4.2),
    ]


def agreements(folder: Path) -> Figures:
    """How the tiers and the peer agree."""
    both = agreement(folder, "exact-1024", "kronfluence-1024")
    tiers = agreement(folder, "fast-4096", "exact-4096")
    return [
        figure("exact_pearson", [both["pearson"]], ">=", 0.9999),
        figure("exact_spearman", [both["spearman"]], ">=", 0.999),
        figure("fast_spearman", [tiers["spearman"]], ">=", 0.99),
        figure("fast_top1_overlap", [tiers["top1_overlap"]], ">=", 0.95),
    ]


def row_store(results: Results, folder: Path) -> Figures:
    """What the row store keeps of the cosines, and what a query takes."""
    kept = agreement(folder, "store", "direct")["pearson"]
    return [
        figure("store_pearson", [kept], ">=", 0.98),
        figure("store_unseen_pearson", [results["store"]["unseen_rows_pearson"]], ">=", 0.98),
        figure("store_query_steps", [per_row(results["store"], "query", max(SIZES))], "<=", 0.01),
    ]
