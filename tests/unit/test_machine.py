"""The notes beside a run say when, from which commit and on what it ran."""

import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

from defense.machine import git_state, hardware, occasion


def git(home: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=home, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_an_occasion_is_now_here_and_outside_git_without_a_commit(tmp_path: Path) -> None:
    found = occasion(tmp_path)
    age = datetime.now(UTC) - datetime.fromisoformat(found["finished"])
    assert timedelta(0) <= age < timedelta(minutes=1)
    assert found["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert found["hardware"]["processor"]
    assert "commit" not in found


def test_a_system_without_affinity_tells_all_its_cores(monkeypatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert hardware()["cores"] == os.cpu_count()


def test_the_commit_is_named_and_whether_tracked_files_differ(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    tracked = tmp_path / "tracked"
    tracked.write_text("before")
    git(tmp_path, "add", "tracked")
    git(tmp_path, "commit", "-qm", "first")
    known = {"commit": git(tmp_path, "rev-parse", "HEAD")}
    (tmp_path / "other").touch()
    assert git_state(tmp_path) == known | {"dirty": False}
    (tmp_path / "metrics").mkdir()
    for name in ("dvc.lock", "metrics/audit.json"):
        (tmp_path / name).write_text("before")
        git(tmp_path, "add", name)
    git(tmp_path, "commit", "-qm", "second")
    known = {"commit": git(tmp_path, "rev-parse", "HEAD")}
    for name in ("dvc.lock", "metrics/audit.json"):
        (tmp_path / name).write_text("after")
    assert git_state(tmp_path) == known | {"dirty": False}, "what a pipeline writes is no source"
    (tmp_path / "below" / "reports").mkdir(parents=True)
    (tmp_path / "below" / "reports" / "audit.json").write_text("before")
    git(tmp_path, "add", "below")
    git(tmp_path, "commit", "-qm", "third")
    (tmp_path / "below" / "reports" / "audit.json").write_text("after")
    assert git_state(tmp_path / "below")["dirty"]  # the lock above it differs, which is not its own
    git(tmp_path, "checkout", "-q", "dvc.lock", "metrics")
    assert not git_state(tmp_path / "below")["dirty"]
    assert git_state(tmp_path)["dirty"]
    git(tmp_path, "checkout", "-q", "below")
    known = {"commit": git(tmp_path, "rev-parse", "HEAD")}
    tracked.write_text("after")
    assert git_state(tmp_path) == known | {"dirty": True}
    assert occasion(tmp_path).items() >= git_state(tmp_path).items()
