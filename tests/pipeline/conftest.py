"""A fresh clone in a temporary folder that has run the pipeline on a cut-down digits set."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GIT = ("git", "-c", "user.name=Test", "-c", "user.email=test@example.org")


def environment() -> dict[str, str]:
    """Put this interpreter first on the path, and leave the user's servers alone."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DVC_", "GIT_"))}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}


def run(home: Path, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder and capture what it says."""
    return subprocess.run(
        command, cwd=home, env=environment() | extra, capture_output=True, text=True, check=False
    )


def stage(home: Path, name: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run one stage directly."""
    return run(home, sys.executable, "-m", "pipelines", name, **extra)


def set_params(home: Path, change: Callable[[dict], object]) -> None:
    """Edit params.yaml in place."""
    params = yaml.safe_load((home / "params.yaml").read_text())
    change(params)
    (home / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def cut_down(params: dict) -> None:
    params["data"] |= {"train_size": 700, "test_size": 500}
    params["attack"] |= {"poison_fraction": 0.05}
    params["transforms"] |= {"num_transforms": 12}


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clone what git would track now, cut the data down and run ``dvc repro``."""
    source, home = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("fresh") / "clone"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "state under test"]):
        assert run(source, *GIT, *command).returncode == 0
    assert run(source, "git", "clone", "-q", str(source), str(home)).returncode == 0
    set_params(home, cut_down)
    done = run(home, sys.executable, "-m", "dvc", "repro")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return home


@pytest.fixture
def home(clone: Path, tmp_path: Path) -> Path:
    """A copy of the finished clone that a test may spoil."""
    copy = tmp_path / "home"
    shutil.copytree(clone, copy, symlinks=True)
    return copy
