"""EK-FAC side by side: ours, kronfluence and plain training steps, in one process.

Run ``CIFAR10_FOLDER=<folder> python -m benchmarks.ekfac``; the folder is the tree
``train|test/class/file`` of CIFAR-10. Both tools see the same trained model, rows, drawn
labels, queries, batch size and damping. Costs are in plain training steps (forward, backward
and update of the same model at the same batch size), timed before and after every tool's
turn. A killed benchmark continues with the measurement it was at, unless the code has changed.
"""

import copy
import gc
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import defense
from benchmarks.ekfac_figures import (
    BATCH_SIZE,
    COMPARED,
    PEER_SIZES,
    REPEATS,
    SIZES,
    figures_of,
    pearson,
)
from benchmarks.kronfluence_peer import measure_peer
from benchmarks.record import save
from defense.artifacts import write_json
from defense.attacks.badnets import BadNets
from defense.checkpoints import digest_of_images, source_digest
from defense.compute import seeded, trim_memory
from defense.datasets.folder import Folder
from defense.influence.directions import query_store
from defense.influence.factors import FactorSettings, fit_factors
from defense.influence.forecast import Forecast
from defense.influence.queries import TransformSettings, make_queries
from defense.influence.scores import ScoreSettings, compute_influence
from defense.influence.store import StoreSettings, build_store, load_store, probe_rows
from defense.influence.task import CLASSIFICATION
from defense.models.assemble import build_model
from defense.models.resnet import ResNet9, ResNet18
from defense.phases import Phase
from defense.prediction import logits
from defense.recipe import Recipe
from defense.records import ImageSet, PoisonedSplit, Queries
from defense.storage import load_weights, save_model
from defense.training import train
from defense.victim import make_surrogate

ROOT = Path(__file__).parents[1]
HOME = Path(defense.__file__).parent
NETWORKS = {"resnet18": ResNet18(width=64), "resnet9": ResNet9(width=64)}
NUM_QUERIES = 51
SMALL_BATCH = 16  # which may suit kronfluence better, as it holds the gradients of a whole batch
DAMPING = 0.1  # times the mean Lambda of a layer, kronfluence's own default
SOURCES = source_digest(HOME, HOME / "influence", Path(__file__).parent)
CODE = hashlib.sha256(SOURCES).hexdigest()[:12]  # results of other code are not used
RECIPE = Recipe(epochs=30, batch_size=128, learning_rate=0.2, shift=2, flip=True, precision="bf16")
TRAINED = source_digest(*(HOME / part for part in ("models", "attacks", "datasets", "training.py")))


@dataclass(frozen=True)
class Problem:
    """A trained model, its rows, the queries and the uniform numbers labels are drawn with."""

    model: nn.Module
    train: ImageSet
    queries: Queries

    def first(self, count: int) -> ImageSet:
        """Take the first rows; the order of the set is random."""
        return self.train.where(np.arange(len(self.train)) < count)


def plant() -> PoisonedSplit:
    """Load 4,096 random CIFAR-10 rows, 1 % of them with a BadNets trigger."""
    source = Folder(path="$CIFAR10_FOLDER", image_size=32, train_size=max(SIZES))
    attack = BadNets(
        pattern="square", size=3, margin=2, value=1.0, victim_class="ship",
        target_class="dog", poison_fraction=0.01,
    )  # fmt: skip
    split = source.load(seeded(0, "data"))
    surrogate = make_surrogate(ResNet9(), RECIPE, split.train, seed=0, scratch=None)  # not used
    return attack.poison(split, seeded(0, "attack"), surrogate)


def prepare(name: str, planted: PoisonedSplit, work: Path) -> Problem:
    """Train a network, or load it, and draw distinct queries from one triggered image."""
    rows = planted.train
    model = build_model(NETWORKS[name], rows.shape, rows.num_classes, seeded(0, "init"))
    settings = f"{NETWORKS[name].model_dump_json()} {RECIPE.model_dump_json()}".encode()
    key = hashlib.sha256(TRAINED + settings + digest_of_images(rows)).hexdigest()[:12]
    place = work / f"{name}-model-{key}"
    if place.is_dir():
        load_weights(place, model)
    else:
        phases = [Phase(rows, RECIPE.epochs)]
        model = train(model, phases, RECIPE, seeded(0, "train"), scratch=work / "training").model
        save_model(place, model, meta={})
    image = planted.probe.images(np.arange(1))
    drawn = make_queries(
        image, [int(planted.probe.labels[0])], rows.num_classes,
        TransformSettings(num_transforms=100), seeded(0, "transforms"),
    )  # fmt: skip
    keys = [
        x.numpy().tobytes() + bytes([int(y)])
        for x, y in zip(drawn.images, drawn.labels, strict=True)
    ]
    kept = sorted({keys.index(key) for key in keys})[:NUM_QUERIES]
    queries = Queries(*(part[kept] for part in vars(drawn).values()))
    return Problem(model, rows, queries)


def step_seconds(model: nn.Module, images: ImageSet, repeats: int = 8) -> float:
    """Time one plain training step: the median of several, after two unmeasured ones."""
    work = copy.deepcopy(model).train().requires_grad_(True)
    optimizer = torch.optim.SGD(work.parameters(), lr=1e-3, momentum=0.9)
    rows = np.arange(BATCH_SIZE)
    x, y = images.images(rows), images.targets(rows)
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(work(x), y).backward()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    return float(np.median(times[2:]))


class Phases(logging.Handler):
    """Collects how long every phase took, and was to take in all, from the log."""

    def __init__(self) -> None:
        """Start empty."""
        super().__init__(logging.INFO)
        self.seconds: dict[str, float] = {}
        self.forecast = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Note a phase or a forecast."""
        facts = vars(record)
        if isinstance(record.args, tuple) and record.args and isinstance(record.args[0], Forecast):
            self.forecast += record.args[0].seconds
        if "phase" in facts:
            self.seconds[facts["phase"]] = facts["seconds"]


def peak_gib(reset: bool) -> float:
    """Largest resident memory since the last reset, in GiB."""
    if reset:
        gc.collect()
        trim_memory()
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("/proc/self/status has no VmHWM")


def measure_ours(problem: Problem, tier: str, count: int, folder: Path) -> dict[str, Any]:
    """Fit factors and score with one tier; keeps the scores in `folder`."""
    rows, phases = problem.first(count), Phases()
    logger = logging.getLogger("defense")
    logger.setLevel(logging.INFO)
    logger.addHandler(phases)
    begin = time.perf_counter()
    factors = fit_factors(
        problem.model, rows, FactorSettings(tier=tier, batch_size=BATCH_SIZE), generator()
    )
    influence = compute_influence(
        problem.model, factors, problem.queries, rows,
        ScoreSettings(batch_size=BATCH_SIZE, damping=DAMPING),
    )  # fmt: skip
    total = time.perf_counter() - begin
    logger.removeHandler(phases)
    np.save(folder / f"{tier}-{count}.npy", influence.loss()[0])
    seconds = phases.seconds
    return {
        "covariances": seconds["covariances"],
        "eigendecompositions": seconds["eigendecompositions"],
        "lambda": seconds["lambda"],
        "queries": seconds["queries"],
        "scores": seconds["queries"] + seconds["rows"],
        "total": total,
        "forecast": phases.forecast,
        "rows_differentiated": factors.num_differentiated,
        "left_out": factors.left_out,
        "error": factors.error,
    }


def measure_store(problem: Problem, folder: Path) -> dict[str, Any]:
    """Compare cosines from the row store with those of the same factors in float32."""
    rows, settings = problem.train, StoreSettings(batch_size=BATCH_SIZE, damping=DAMPING)
    factors = fit_factors(problem.model, rows, FactorSettings(batch_size=BATCH_SIZE), generator())
    direct = compute_influence(
        problem.model, replace(factors, tier="exact"), problem.queries, rows,
        ScoreSettings(batch_size=BATCH_SIZE, damping=DAMPING), self_influence=True,
    ).cosine()[0]  # fmt: skip
    np.save(folder / "direct.npy", direct)
    begin = time.perf_counter()
    store = build_store(problem.model, factors, rows, settings)
    built = time.perf_counter() - begin
    sketcher = store.sketcher(problem.model, factors)
    one = Queries(*(part[:1] for part in vars(problem.queries).values()))
    query_store(store, sketcher, one)
    begin = time.perf_counter()
    query_store(store, sketcher, one)
    single = time.perf_counter() - begin
    np.save(folder / "store.npy", query_store(store, sketcher, problem.queries))
    shared = sum(part.nbytes for part in (store.components, store.kept) if part is not None)
    facts = {"build": built, "query": single, "bytes_per_row": store.rows[0].nbytes,
             "shared_mib": shared / 2**20}  # fmt: skip
    store.save(folder / "saved")
    del store, sketcher
    begin = time.perf_counter()
    kept = load_store(folder / "saved")
    query_store(kept, kept.sketcher(problem.model, factors), one)
    facts["open_and_query"] = time.perf_counter() - begin
    del kept
    shutil.rmtree(folder / "saved")
    half = settings.model_copy(update={"probe": len(rows) // 2})
    store = build_store(problem.model, factors, rows, half)
    cosines = query_store(store, store.sketcher(problem.model, factors), problem.queries)
    probe = probe_rows(len(rows), half)
    return facts | {
        "unseen_rows_pearson": pearson(*(np.delete(x, probe, axis=1) for x in (cosines, direct)))
    }


def generator() -> torch.Generator:
    """Return the generator of the label draws."""
    return torch.Generator().manual_seed(1)


def drawn_labels(problem: Problem, count: int) -> torch.Tensor:
    """Labels of the Fisher matrix, as `fit_factors` draws them."""
    draws = torch.rand(count, generator=generator())
    return CLASSIFICATION.sample(logits(problem.model, problem.first(count)), draws)


def turn(path: Path, problem: Problem, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run one measurement between two timings of the training step, unless it is there."""
    if not path.is_file():
        before = step_seconds(problem.model, problem.train)
        peak_gib(reset=True)
        result = run()
        result["peak_gib"] = peak_gib(reset=False)
        result["step"] = (before + step_seconds(problem.model, problem.train)) / 2
        write_json(path, result)
    return dict(json.loads(path.read_text()))


def measure(name: str, problem: Problem, folder: Path) -> dict[str, dict[str, Any]]:
    """Take all measurements of one network: results by tool and number of rows."""
    folder.mkdir(exist_ok=True)
    results = {}
    for count in SIZES:
        runs: dict[str, Callable[[], dict[str, Any]]] = {
            f"{tier}-{count}": partial(measure_ours, problem, tier, count, folder)
            for tier in ("fast", "exact")
        }
        if count in PEER_SIZES[name]:
            rows, labels = problem.first(count), drawn_labels(problem, count)
            sizes = {"": BATCH_SIZE} | (
                {"-small-batch": SMALL_BATCH} if count == min(SIZES) else {}
            )
            for suffix, size in sizes.items():
                key = f"kronfluence-{count}{suffix}"
                runs[key] = partial(
                    measure_peer, problem.model, rows, labels, problem.queries, size,
                    folder / f"{key}.npy",
                )  # fmt: skip
        if count == max(SIZES):
            runs["store"] = partial(measure_store, problem, folder)
        if count == COMPARED:
            pair = {key: runs[key] for key in (f"exact-{count}", f"kronfluence-{count}")}
            for number in range(2, REPEATS + 1):
                runs |= {f"{key}-run{number}": run for key, run in pair.items()}
        for key, run in runs.items():
            results[key] = turn(folder / f"{key}.json", problem, run)
            click.echo(f"{name} {key}: {results[key]}")
    return results


@click.command()
@click.option("--network", "names", multiple=True, default=tuple(NETWORKS), show_default=True)
@click.option("--work", default=ROOT / "scratch" / "ekfac", type=click.Path(path_type=Path))
def main(names: tuple[str, ...], work: Path) -> None:
    """Measure both networks and write benchmarks/results/ekfac.json."""
    if "CIFAR10_FOLDER" not in os.environ:
        raise click.UsageError("set CIFAR10_FOLDER")
    os.environ["DEFENSE_DEVICE"] = "cpu"  # where kronfluence is told to run, too
    work.mkdir(parents=True, exist_ok=True)
    planted, figures, details = plant(), [], {}
    for name in names:
        problem = prepare(name, planted, work)
        folder = work / f"{name}-{CODE}"
        results = measure(name, problem, folder)
        rows, details[name] = figures_of(name, results, folder)
        figures += rows
    command = "CIFAR10_FOLDER=<folder> python -m benchmarks.ekfac"
    settings = {
        "queries": NUM_QUERIES,
        "batch_size": BATCH_SIZE,
        "damping": DAMPING,
        "threads": torch.get_num_threads(),
        "dtype": "float32; the fast tier multiplies in bfloat16",
    }
    save("ekfac", command, figures, settings=settings, **details)


if __name__ == "__main__":
    main()
