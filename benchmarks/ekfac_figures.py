"""Figures of `benchmarks.ekfac`, derived from what every tool took."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.record import figure

SIZES = (256, 1024, 4096)
PEER_SIZES = {"resnet18": (256, 1024), "resnet9": (256, 1024)}
BATCH_SIZE = 64
COMPARED = 1024  # rows at which both tools are run several times, by turns
REPEATS = 3


def slope(results: dict[str, dict[str, Any]], tool: str, few: int, many: int) -> float:
    """Training steps per row of the scores, preconditioning included, from two numbers of rows."""
    first, second = results[f"{tool}-{few}"], results[f"{tool}-{many}"]
    step = (first["step"] + second["step"]) / 2
    return (second["scores"] - first["scores"]) / (many - few) / (step / BATCH_SIZE)


def per_row(result: dict[str, Any], phase: str, count: int) -> float:
    """Training steps per row of a phase."""
    return result[phase] / count / (result["step"] / BATCH_SIZE)


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


def peer_total(results: dict[str, dict[str, Any]], count: int, sizes: tuple[int, ...]) -> float:
    """Extrapolate the peer's time from its two largest runs, linearly, phase by phase."""
    few, many = sizes[-2:]
    first, second = results[f"kronfluence-{few}"], results[f"kronfluence-{many}"]
    grow = ("covariances", "lambda", "scores")
    each = sum((second[phase] - first[phase]) / (many - few) for phase in grow)
    return sum(second[phase] for phase in (*grow, "eigendecompositions")) + each * (count - many)


Results = dict[str, dict[str, Any]]
Figures = list[dict[str, Any]]


def figures_of(name: str, results: Results, folder: Path) -> tuple[Figures, dict[str, Any]]:
    """Derive the figures of one network, and the peer's numbers beside them."""
    peer = peer_costs(name, results)
    rows = [*costs(results, peer), *agreements(folder), *row_store(results, folder)]
    return [row | {"id": f"{name}_{row['id']}"} for row in rows], {"peer": peer, "runs": results}


def fixed_seconds(results: Results, tool: str, few: int, many: int) -> float:
    """Eigenproblems at 1,024 rows, and what of the scores does not grow with the rows."""
    run = results[f"{tool}-1024"]
    growing = slope(results, tool, few, many) * 1024 * run["step"] / BATCH_SIZE
    return float(run["eigendecompositions"] + run["scores"] - growing)


def peer_costs(name: str, results: Results) -> dict[str, float]:
    """What kronfluence takes: steps per row at 1,024 rows, and seconds.

    ``small_batch_time`` and ``small_batch_memory`` say what a batch of 16 takes of that.
    """
    run, small = results["kronfluence-1024"], results["kronfluence-256-small-batch"]
    return {
        "covariance_steps": per_row(run, "covariances", 1024),
        "lambda_steps": per_row(run, "lambda", 1024),
        "scores_steps": slope(results, "kronfluence", 256, 1024),
        "fixed_seconds": fixed_seconds(results, "kronfluence", 256, 1024),
        "small_batch_time": small["total"] / results["kronfluence-256"]["total"],
        "small_batch_memory": small["peak_gib"] / results["kronfluence-256"]["peak_gib"],
        "total_seconds_1024": statistics.median(totals(results, "kronfluence")),
        "total_seconds_4096": peer_total(results, max(SIZES), PEER_SIZES[name]),
    }


def totals(results: Results, tool: str) -> list[float]:
    """Seconds of a tool's runs at 1,024 rows, in the order they were made."""
    keys = [f"{tool}-{COMPARED}", *(f"{tool}-{COMPARED}-run{n}" for n in range(2, REPEATS + 1))]
    return [results[key]["total"] for key in keys]


def costs(results: Results, peer: dict[str, float]) -> Figures:
    """Time and memory."""
    most = max(SIZES)
    exact, fast, theirs = (results[key] for key in ("exact-1024", "fast-4096", "kronfluence-1024"))
    fixed = fixed_seconds(results, "exact", 1024, most)
    epoch = most / BATCH_SIZE * fast["step"]
    growth = results["exact-4096"]["total"] / exact["total"]
    memory = results["fast-1024"]["peak_gib"] / theirs["peak_gib"]
    pairs = zip(totals(results, "kronfluence"), totals(results, "exact"), strict=True)
    ratios = [other / ours for other, ours in pairs]
    return [
        figure("covariance_steps", [per_row(exact, "covariances", 1024)], "<=", 2.5),
        figure("lambda_steps", [per_row(exact, "lambda", 1024)], "<=", 4.5),
        figure("scores_steps", [slope(results, "exact", 1024, most)], "<=", 2.5),
        figure("fixed_ratio", [fixed / peer["fixed_seconds"]], "<=", 1 / 3),
        figure("exact_speedup", ratios, ">=", 8),
        figure("fast_epochs", [fast["total"] / epoch], "<=", 4),
        figure("fast_speedup", [peer["total_seconds_4096"] / fast["total"]], ">=", 20),
        figure("memory_ratio", [memory], "<=", 0.5),
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
        figure("store_query_steps", [per_row(results["store"], "query", max(SIZES))], "<=", 0.01),
    ]
