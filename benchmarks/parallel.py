"""Cells of pipelines/paper and models of the detection benchmark, several at a time.

DVC runs one stage after the other. Here every process takes the next one that can run and loads
its packages once, so that one accelerator, or a machine of many cores, is kept busy:

``python -m benchmarks.parallel --processes 14 --run audit 'cifar10/*/badnets/normalised/*'
--model badnets_025-2`` runs all stages that the audits need, and measures a model beside them. What
ran before, with the parameters of today and what it needs unchanged, is not run again; so a killed
call goes on where it was. The code is not looked at: after a change, delete the cells it concerns.
"""

import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.detection import measured
from benchmarks.paper_cells import HOME, noted
from defense.compute import progress
from pipelines.__main__ import main as stage_main
from pipelines.params import read_yaml

ROOT = Path(__file__).parents[1]
WORK = ROOT / "scratch" / "parallel"
MODEL = "model"  # stands for a stage where a model of the detection benchmark is measured


@dataclass(frozen=True)
class Job:
    """Something to run.

    Attributes:
        stage: Of the pipeline, or `MODEL`.
        cell: Of the matrix, or name and seed of a model.
        needs: Names of jobs that run before.
    """

    stage: str
    cell: str
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How others call it."""
        return f"{self.stage} {self.cell}"

    @property
    def note(self) -> Path:
        """What the stage writes down when it is done."""
        return HOME / "cells" / self.cell / "metrics" / f"{self.stage}.run.json"


Jobs = dict[str, Job]


def matrix(home: Path = HOME) -> Jobs:
    """List all stages of all cells; each needs those that write what it reads."""
    text = read_yaml(home / "dvc.yaml")
    lists, owners, read_by = text["vars"][1]["of"], dict[str, str](), dict[str, list[str]]()
    for stage in text["stages"].values():
        for item in items(stage["matrix"], lists):
            name = fill(stage["cmd"], item).removeprefix("python -m pipelines ")
            owners |= {fill(next(iter(out)), item): name for out in stage["outs"]}
            read_by[name] = [fill(dep, item) for dep in stage["deps"] if dep.startswith("cells/")]
    jobs = Jobs()
    for name, files in read_by.items():
        stage, cell = name.split(" --cell ")
        needs = dict.fromkeys(owners[file].replace(" --cell", "") for file in files)
        jobs[f"{stage} {cell}"] = Job(stage, cell, tuple(needs))
    return jobs


def items(axes: dict[str, Any], lists: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the items of a stage's matrix."""
    given = (lists[axis[5:-1]] if isinstance(axis, str) else axis for axis in axes.values())
    return (dict(zip(axes, item, strict=True)) for item in product(*given))  # "${of.name}"


def fill(text: str, item: dict[str, Any]) -> str:
    """Put the values of an item into a template."""
    for name, value in item.items():
        for key, part in value.items() if isinstance(value, dict) else [("", value)]:
            text = text.replace(f"${{item.{name}{'.' if key else ''}{key}}}", str(part))
    return text


def chosen(jobs: Jobs, runs: Sequence[tuple[str, str]]) -> Jobs:
    """Choose jobs and all that they need, which comes first.

    Args:
        jobs: All of them.
        runs: Stages, and patterns of their cells; ``*`` stands for one part or some of it.

    Raises:
        click.UsageError: A stage has no such cell.
    """
    plan = Jobs()

    def add(name: str) -> None:
        for need in jobs[name].needs:
            add(need)
        plan.setdefault(name, jobs[name])

    for stage, pattern in runs:
        asked = [name for name, job in jobs.items() if job.stage == stage and _fits(job, pattern)]
        if not asked:
            raise click.UsageError(f"stage {stage} has no cell {pattern}: see {HOME / 'dvc.yaml'}")
        for name in asked:
            add(name)
    return plan


def _fits(job: Job, pattern: str) -> bool:
    parts, wanted = job.cell.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch, parts, wanted))


def current(plan: Jobs) -> set[str]:
    """Name the jobs that ran with the parameters of today, after all that they need."""
    done = set[str]()
    for name, job in plan.items():
        if not done.issuperset(job.needs) or not job.note.is_file():
            continue
        newest = max((plan[need].note.stat().st_mtime for need in job.needs), default=0.0)
        if newest <= job.note.stat().st_mtime and noted(HOME, job.cell, job.stage):
            done.add(name)
    return done


def run_all(
    plan: Jobs,
    done: set[str],
    pool: Executor,
    processes: int,
    work: Callable[[str, str], str | None],
    until: float,
) -> dict[str, str]:
    """Run what is not done, first things first, and nothing whose needs failed.

    Args:
        plan: All jobs; needs come before what needs them.
        done: Names of those that need not run; those that ran are added.
        pool: Where they run.
        processes: How many at a time.
        work: Runs one, given stage and cell; returns an error or None.
        until: Time (`time.time`) from which on nothing is begun.

    Returns:
        Errors by the name of the job.
    """
    running, failed = dict[Future[str | None], str](), dict[str, str]()
    with progress(total=len(plan), initial=len(done), desc="jobs", unit="job") as bar:
        while True:
            busy = {*running.values(), *done, *failed}
            ready = (n for n, job in plan.items() if n not in busy and done.issuperset(job.needs))
            for name in list(ready)[: processes - len(running)] if time.time() < until else []:
                running[pool.submit(work, plan[name].stage, plan[name].cell)] = name
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, error = running.pop(future), future.result()
                if error is None:
                    done.add(name)
                else:
                    failed[name] = error
                    click.echo(f"failed: {name}: {error}", err=True)
                bar.update()


def run_one(stage: str, cell: str) -> str | None:
    """Run a stage, or measure a model; returns what went wrong."""
    try:
        if stage == MODEL:
            _measure(cell)
        else:
            assert stage_main.callback is not None
            stage_main.callback(stage, cell)
    except SystemExit as stop:
        return f"exit code {stop.code}, see {WORK}" if stop.code else None
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return None


def _measure(cell: str) -> None:
    """Measure ``name-seed``, with repairs if ``+repair`` follows."""
    model, _, more = cell.partition("+")
    name, seed = model.rsplit("-", 1)
    measured(name, int(seed), ROOT / "scratch" / "detection", repair=more == "repair")


def begin() -> None:
    """Prepare a process: one thread, the matrix's folder, a log of its own."""
    os.chdir(HOME)
    torch.set_num_threads(1)
    log = os.open(WORK / f"{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)


@click.command()
@click.option("--processes", default=os.cpu_count() or 1, show_default=True)
@click.option("--run", "runs", nargs=2, multiple=True, help="A stage, and a pattern of cells.")
@click.option("--model", "models", multiple=True, help="Such as badnets_1-2 or sig_1-3+repair.")
@click.option("--minutes", default=float("inf"), help="After these nothing is begun.")
def main(
    processes: int, runs: tuple[tuple[str, str], ...], models: tuple[str, ...], minutes: float
) -> None:
    """Run stages of the matrix and measure models of the detection benchmark."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    WORK.mkdir(parents=True, exist_ok=True)
    plan = chosen(matrix(), runs)
    plan |= {job.name: job for job in (Job(MODEL, model) for model in models)}
    context, until = get_context("spawn"), time.time() + 60 * minutes
    with ProcessPoolExecutor(processes, mp_context=context, initializer=begin) as pool:
        done = current(plan)
        failed = run_all(plan, done, pool, processes, run_one, until)
    click.echo(f"{len(done)} of {len(plan)} done, {len(failed)} failed; logs in {WORK}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
