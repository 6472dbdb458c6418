"""Run one stage: ``python -m pipelines <stage>``."""

import importlib
import logging
import shutil
import sys

import click

from defense.errors import DefenseError
from pipelines import paths
from pipelines.params import read_params

STAGES = (
    "data",
    "poison",
    "train",
    "factors",
    "influence",
    "detect",
    "remediate",
    "audit",
    "gate",
    "track",
)


@click.command()
@click.argument("stage", type=click.Choice(STAGES))
def main(stage: str) -> None:
    """Run one stage in the current folder; all of params.yaml is validated first."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("defense").setLevel(logging.INFO)
    try:
        params = read_params(paths.PARAMS)
        done = importlib.import_module(f"pipelines.stages.{stage}").run(params)
    except DefenseError as error:
        click.echo(f"error: {stage}: {error}", err=True)
        sys.exit(2)
    shutil.rmtree(paths.SCRATCH / stage, ignore_errors=True)
    click.echo(done)


if __name__ == "__main__":
    main()
