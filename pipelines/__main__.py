"""Run one stage: ``python -m pipelines <stage>``."""

import importlib
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click

from defense.artifacts import write_json
from defense.errors import DefenseError
from pipelines.matrix import read_cell, settings_of
from pipelines.params import read_params
from pipelines.paths import PARAMS, Paths

STAGES = (
    "data",
    "poison",
    "train",
    "factors",
    "directions",
    "scan",
    "influence",
    "detect",
    "confirm",
    "remediate",
    "audit",
    "gate",
    "track",
    "reference",
    "counterfactual",
)


@click.command()
@click.argument("stage", type=click.Choice(STAGES))
@click.option("--cell", help="Cell of a matrix of runs, such as cifar10/0/badnets/delta/eu.")
def main(stage: str, cell: str | None) -> None:
    """Run one stage in the current folder; all of params.yaml is validated first."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("defense").setLevel(logging.INFO)
    try:
        params, paths = read_cell(PARAMS, cell, stage) if cell else (read_params(PARAMS), Paths())
        start, resumed = clocks(), paths.scratch(stage).is_dir()
        done = importlib.import_module(f"pipelines.stages.{stage}").run(params, paths)
    except DefenseError as error:
        click.echo(f"error: {stage}: {error}", err=True)
        sys.exit(2)
    shutil.rmtree(paths.scratch(stage), ignore_errors=True)
    if cell:  # for the tables; no output of DVC, because it differs from run to run
        passed = {name: None if resumed else end - start[name] for name, end in clocks().items()}
        note = passed | occasion() | {"settings": settings_of(params, paths, stage)}
        write_json(paths.metrics(stage).with_suffix(".run.json"), note)
    click.echo(done)


def occasion() -> dict[str, Any]:
    """Say when, from which commit and on what a stage ran; no stage depends on how that is said."""
    here = importlib.import_module("defense.machine").occasion(Path())
    return here | importlib.import_module("defense.compute").runs_on()


def clocks() -> dict[str, float]:
    """Read the clock on the wall, and the time all cores have spent on this process."""
    return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}


if __name__ == "__main__":
    main()
