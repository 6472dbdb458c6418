"""Commands for release managers and auditors. Imports no torch, but to scan."""

import os
import sys
from pathlib import Path
from typing import Any

import click
import yaml

from defense.errors import DefenseError, EvidenceError
from defense.gate import Policy, to_markdown, verify
from defense.lineage import read_lineage, verify_lineage

BLOCKED, USAGE, EVIDENCE, CRASH, INTERRUPTED = 1, 2, 3, 70, 130

HOME = click.option(
    "--home",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    show_default=True,
    help="Folder that holds params.yaml, artifacts and reports.",
)


@click.group()
@click.version_option(package_name="delta-defense")
def cli() -> None:
    """Decide on releases, and follow the evidence."""


@cli.command()
@HOME
@click.option(
    "--summary",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also append the verdict as Markdown to this file, such as $GITHUB_STEP_SUMMARY.",
)
def gate(home: Path, summary: Path | None) -> None:
    """Judge the recorded evidence under the policy in params.yaml.

    Exit codes: 0 pass, 1 blocked, 2 usage, 3 evidence missing or not matching its hash,
    70 crash, 130 interrupted.
    """
    verdict = verify(home, read_policy(home / "params.yaml"))
    text = to_markdown(verdict)
    say(text)
    if summary is not None:
        try:
            with summary.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise DefenseError(
                f"--summary {summary} cannot be written: {error.strerror}"
            ) from error
    if not verdict.passed:
        raise SystemExit(BLOCKED)


def say(text: str) -> None:
    """Print; a reader that has gone away must not turn the exit code into a verdict."""
    try:
        click.echo(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_policy(path: Path) -> Policy:
    """Read the ``gate`` section of a params file.

    Raises:
        DefenseError: The file or the section is missing or not valid.
    """
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Policy.model_validate(params["gate"])
    except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DefenseError(
            f"expected a policy in section 'gate' of {path}, got: {reason}"
        ) from error


@cli.command()
@HOME
@click.option(
    "--inputs",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of images, or an images artefact, to start from; else the training set alone.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="scan",
    show_default=True,
    help="Folder to write to.",
)
def scan(home: Path, inputs: Path | None, out: Path) -> None:
    """Look for poison without an incident: blocks of rows that dictate predictions.

    With --inputs only the classes that inputs are predicted as are looked at.

    Exit codes: 0 nothing suspected, 1 poison suspected, 2 usage, 3 undecided because a block is
    unclear, or because classes have too few rows or clean inputs, 70 crash, 130 interrupted.
    """
    from defense.scanning import scan_home  # brings torch

    sys.path.append(str(home.resolve()))  # where the factory of a model may lie
    found, blocks = scan_home(home, inputs, out)
    for line in (*blocks, f"{found.verdict}, see {out}"):
        say(line)
    if found.suspected:
        raise SystemExit(BLOCKED)
    if found.verdict != "nothing suspected":
        raise SystemExit(EVIDENCE)


@cli.group()
def lineage() -> None:
    """Follow data, model and verdict by sha256."""


@lineage.command()
@HOME
def show(home: Path) -> None:
    """Print every artefact and what it was computed from."""
    record = read_lineage(home)
    names = {node["sha256"]: name for name, node in record["nodes"].items()}
    say(f"lineage {record['digest']}")
    for name, node in record["nodes"].items():
        sources = (
            ", ".join(names.get(sha, sha[:12]) for sha in node["inputs"].values()) or "nothing"
        )
        say(f"{node['sha256'][:12]}  {name:<12} {node['path']:<26} from {sources}")


@lineage.command(name="verify")
@HOME
def verify_command(home: Path) -> None:
    """Hash every file of the lineage again; exit code 3 if anything does not hold."""
    problems = verify_lineage(home)
    for line in problems:
        click.echo(line, err=True)
    if problems:
        raise SystemExit(EVIDENCE)
    say(f"lineage {read_lineage(home)['digest']} holds")


def main(arguments: list[str] | None = None) -> Any:
    """Run a command; turns every error into one line and an exit code."""
    try:
        cli.main(arguments, standalone_mode=False)
    except SystemExit as stop:
        code = stop.code
    except click.ClickException as error:
        error.show()
        code = USAGE
    except click.Abort:
        code = _fail("interrupted", INTERRUPTED)
    except EvidenceError as error:
        code = _fail(error, EVIDENCE)
    except DefenseError as error:
        code = _fail(error, USAGE)
    except Exception as error:  # the last resort: a bug must not read as a verdict
        code = _fail(f"internal error: {type(error).__name__}: {error}", CRASH)
    else:
        code = 0
    sys.exit(code)


def _fail(message: object, code: int) -> int:
    click.echo(f"error: {message}", err=True)
    return code
