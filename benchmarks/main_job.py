"""The main job: time and memory of `dvc repro`, and what it achieves on digits and CIFAR-10.

Run ``python -m benchmarks.main_job`` in a clone whose changes are committed: every run happens
in a clone of HEAD. CIFAR10_FOLDER names the tree ``train|test/class/file`` of CIFAR-10 that
the pipeline of ``pipelines/cifar10`` reads. A killed benchmark continues where it was.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil

from benchmarks.record import figure, save
from defense.artifacts import write_json

ROOT = Path(__file__).parents[1]
SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Cost:
    """Wall-clock seconds and the largest summed resident memory of a process tree, in bytes."""

    seconds: float
    peak: int


def run(command: list[str], folder: Path, home: Path) -> Cost:
    """Run a command of a clone and measure its whole process tree."""
    environment = os.environ | {
        "PYTHONPATH": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    start = time.monotonic()
    with subprocess.Popen(command, cwd=folder, env=environment) as process:
        peak, done = [0], threading.Event()
        sampler = threading.Thread(target=_sample, args=(process.pid, peak, done))
        sampler.start()
        code = process.wait()
        seconds = time.monotonic() - start
        done.set()
        sampler.join()
    if code:
        raise SystemExit(f"{' '.join(command)} failed with exit code {code}")
    return Cost(seconds, peak[0])


def _sample(pid: int, peak: list[int], done: threading.Event) -> None:
    """Note the largest summed resident memory of a process and its descendants."""
    while not done.wait(SAMPLE_SECONDS):
        total = 0
        try:
            root = psutil.Process(pid)
            for process in [root, *root.children(recursive=True)]:
                total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # one of them ended between the two calls
        peak[0] = max(peak[0], total)


def clone(target: Path) -> Path:
    """Clone HEAD, or go on with the clone that is there."""
    if not target.is_dir():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(target)], check=True)
    head, other = (_git_head(folder) for folder in (ROOT, target))
    if head != other:
        raise SystemExit(f"{target} holds commit {other}, HEAD is {head}: delete it first")
    return target


def _git_head(folder: Path) -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def set_seed(params: Path, seed: int) -> None:
    """Set the seed of a pipeline."""
    text = params.read_text()
    params.write_text(re.sub(r"^seed: \d+$", f"seed: {seed}", text, flags=re.MULTILINE))


def root_pipeline(work: Path, seeds: int) -> tuple[Cost, Cost, list[dict[str, Any]]]:
    """Time the first and second `dvc repro` of a clean clone, then repeat it with other seeds."""
    home = clone(work / "root")
    costs, results = work / "root_costs.json", []
    if not costs.is_file():
        first, again = (run(["dvc", "repro"], home, home) for _ in range(2))
        write_json(costs, [vars(first), vars(again)])
    first, again = (Cost(**cost) for cost in json.loads(costs.read_text()))
    for seed in range(seeds):
        results.append(outcome(home, home, "dvc.yaml", seed))
    return first, again, results


def outcome(home: Path, folder: Path, pipeline: str, seed: int) -> dict[str, Any]:
    """Run one pipeline with a seed and return its headline figures."""
    set_seed(folder / "params.yaml", seed)
    cost = run(["dvc", "repro", pipeline], home, home)
    figures = json.loads((folder / "metrics" / "audit.json").read_text())
    return {"seed": seed, "seconds": round(cost.seconds), **figures}


def cifar10_pipeline(work: Path, seeds: int) -> list[dict[str, Any]]:
    """Run the CIFAR-10 pipeline once per seed, each in its own clone."""
    results = []
    for seed in range(seeds):
        home, kept = clone(work / f"cifar10-{seed}"), work / f"cifar10-{seed}.json"
        if not kept.is_file():
            folder = home / "pipelines" / "cifar10"
            write_json(kept, outcome(home, folder, "pipelines/cifar10/dvc.yaml", seed))
        results.append(json.loads(kept.read_text()))
    return results


def quality_figures(prefix: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Summarise the figures both pipelines share."""
    before = [entry["before"]["psr"] for entry in runs]
    after = [entry["after"]["psr"] for entry in runs]
    drop = [entry["accuracy_drop"] for entry in runs]
    return [
        figure(f"{prefix}_psr_before", before, ">=", 0.90),
        figure(f"{prefix}_psr_after", after, "<=", 0.05),
        figure(f"{prefix}_accuracy_drop", drop, "<=", 0.02),
    ]


@click.command()
@click.option("--seeds", default=5, show_default=True, help="Runs of the root pipeline.")
@click.option("--cifar10-seeds", default=3, show_default=True, help="Runs on CIFAR-10.")
@click.option("--work", default=ROOT / "scratch" / "main_job", type=click.Path(path_type=Path))
def main(seeds: int, cifar10_seeds: int, work: Path) -> None:
    """Measure the main job and write benchmarks/results/main_job.json."""
    if cifar10_seeds and "CIFAR10_FOLDER" not in os.environ:
        raise click.UsageError("set CIFAR10_FOLDER, or leave CIFAR-10 out with --cifar10-seeds 0")
    work.mkdir(parents=True, exist_ok=True)
    first, again, digits = root_pipeline(work, seeds)
    recall = [entry["detection"]["predicted_label"]["tpr"] for entry in digits]
    figures = [
        figure("root_seconds", [first.seconds], "<=", 180),
        figure("root_peak_gib", [first.peak / 2**30], "<=", 2),
        figure("noop_seconds", [again.seconds], "<=", 10),
        *quality_figures("digits", digits),
        figure("digits_tpr", recall, ">=", 0.95),
    ]
    command, details = "python -m benchmarks.main_job", {"digits": digits}
    if cifar10_seeds:
        command = f"CIFAR10_FOLDER=<folder> {command}"
        details["cifar10"] = cifar10_pipeline(work, cifar10_seeds)
        figures += quality_figures("cifar10", details["cifar10"])
    save("main_job", command, figures, **details)


if __name__ == "__main__":
    main()
