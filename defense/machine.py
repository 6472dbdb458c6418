"""What a run ran on, for the notes beside its output; nothing of it goes into an artefact."""

import getpass
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

WRITTEN = ("dvc.lock", "metrics", "reports")  # by a pipeline, of what git tracks
UNITS = ("avx512f", "avx512_bf16", "amx_bf16")  # of low precision, by which machines differ


def occasion(home: Path) -> dict[str, Any]:
    """Say when, from which commit and on what machine something runs, beside ``home``'s files."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"finished": now, "hardware": hardware()} | git_state(home)


def user() -> str:
    """Name who runs this; by number where the system knows no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def hardware() -> dict[str, Any]:
    """Describe the machine: processor, cores this process may use, GiB of memory, system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return {
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
    }


def git_state(home: Path) -> dict[str, Any]:
    """Return ``commit`` and ``dirty``: whether tracked files differ (None if git cannot say).

    What a pipeline writes beside its home's sources does not count. Empty outside git.
    """
    commit = _git(home, "rev-parse", "HEAD")
    if commit is None:
        return {}
    sources = [":/", *(f":(exclude){name}" for name in WRITTEN)]
    changes = _git(home, "status", "--porcelain", "--untracked-files=no", "--", *sources)
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _processor() -> str:
    """Name the processor and the low-precision units that matter here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    units = [unit for unit in UNITS if unit in facts.get("flags", "").split()]
    family = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    return f"{facts.get('model name', platform.processor())} ({family}; {', '.join(units)})"


def _git(home: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=home, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
