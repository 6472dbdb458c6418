"""What the cells of ``pipelines/paper`` found, gathered into one record per attack and seed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, hardware
from defense.errors import DefenseError
from defense.metrics import detection_quality
from defense.records import Truth
from defense.storage import load_flags, load_truth
from pipelines.matrix import read_cell, settings_of
from pipelines.paths import REFERENCES

HOME = Path(__file__).parents[1] / "pipelines" / "paper"
STORE = RESULTS / "paper.json"
FOUND = ("tpr", "precision")
ATTACK_STAGES = ("factors", "influence", "directions")  # of which detectors need some

Cell = dict[str, Any]
Cells = dict[str, Cell]


def gather(home: Path = HOME, store: Path = STORE) -> Cells:
    """Collect all cells on this machine, on top of those that were kept before.

    A record that was made under other parameters is dropped.

    Args:
        home: Folder of the matrix, with its params.yaml and cells.
        store: Results that were kept.

    Returns:
        Records by ``world/seed/attack``, each with the digest of the parameters they hang on.
    """
    kept: Cells = json.loads(store.read_text())["cells"] if store.is_file() else {}
    cells = {
        name: cell | {part: _current(home, name, cell[part]) for part in ("detectors", "repairs")}
        for name, cell in kept.items()
        if cell["settings"] == _settings(home, name, "influence")
    }
    for folder in sorted((home / "cells").glob("*/*/*")):
        name = "/".join(folder.parts[-3:])
        if _note(home, folder, name, "train") is not None:
            found = _attack(home, folder, name)
            old = cells.get(name, {"detectors": {}, "repairs": {}})
            merged = {part: old[part] | found[part] for part in ("detectors", "repairs")}
            cells[name] = old | found | merged
    return cells


def _current(home: Path, name: str, records: dict[str, Cell]) -> dict[str, Cell]:
    """Keep the records that were made under the parameters of today."""
    return {
        part: record
        for part, record in records.items()
        if record["settings"] == _settings(home, f"{name}/{part}", _stage(part))
    }


def _stage(part: str) -> str:
    """Name the stage that makes the flags of a detector, or a repair ``detector/unlearner``."""
    if "/" in part:
        return "remediate"
    return "reference" if part in REFERENCES else "detect"


def _settings(home: Path, cell: str, stage: str) -> str | None:
    """Digest the parameters of a cell; None if there is no such cell any more."""
    try:
        return settings_of(*read_cell(home / "params.yaml", cell, stage), stage)
    except DefenseError:
        return None


def _note(home: Path, folder: Path, cell: str, stage: str) -> Cell | None:
    """Read what a stage noted when it ran; None if it has not, or under other parameters."""
    path = folder / "metrics" / f"{stage}.run.json"
    note = _read(path) if path.is_file() else None
    current = note is not None and note["settings"] == _settings(home, cell, stage)
    return note if current else None


def _cost(note: Cell) -> float | None:
    """CPU seconds of a stage; None where an accelerator did the work, or a run was resumed."""
    seconds: float | None = note["cpu_seconds"] if note["device"] == "cpu" else None
    return seconds


def _attack(home: Path, folder: Path, name: str) -> Cell:
    truth, _ = load_truth(folder / "artifacts" / "truth")
    stages = {stage: _note(home, folder, name, stage) for stage in ATTACK_STAGES}
    trained = _read(folder / "metrics" / "train.run.json")
    where = {key: trained[key] for key in ("device", "torch")}
    cell: Cell = {
        "settings": _settings(home, name, "influence"),
        "hardware": hardware() | where if where["device"] == "cpu" else where,
        "success": _read(folder / "metrics" / "train.json")["success"],
        "cpu_seconds": {stage: _cost(note) for stage, note in stages.items() if note},
        "detectors": {},
        "repairs": {},
    }
    for place in sorted(folder.glob("*/artifacts/flags")):
        _add_detector(home, cell, place, name, truth)
    for report in sorted(folder.glob("*/*/reports/audit.json")):
        _add_repair(home, cell, report, name)
    return cell


def _add_detector(home: Path, cell: Cell, place: Path, name: str, truth: Truth) -> None:
    """Add what a detector flagged, and what the counterfactuals made of it."""
    folder = place.parents[1]
    note = _note(home, folder, f"{name}/{folder.name}", _stage(folder.name))
    if note is None:
        return
    flags, _ = load_flags(place)
    cell["share"] = {
        "all": float(truth.poisoned.mean()),
        "predicted_label": float(truth.poisoned[flags.predicted_label].mean()),
    }
    cell["detectors"][folder.name] = {
        "settings": note["settings"],
        "cpu_seconds": _cost(note),
        "flagged": int(flags.mask.sum()),
        "all_flagged": bool(flags.mask.all()),
    } | {
        entry.rows: {key: getattr(entry, key).value for key in FOUND}
        | {"average_precision": entry.average_precision}
        for entry in detection_quality(flags, truth)
    }
    file = folder / "metrics" / "counterfactual.json"
    if _note(home, folder, f"{name}/{folder.name}", "counterfactual") is not None:
        cell["detectors"][folder.name]["counterfactual"] = {
            removed: {"removed": entry["removed"]}
            | {
                short: [model[key]["value"] for model in entry["trainings"]]
                for short, key in (("psr", "psr"), ("accuracy", "clean_accuracy"))
            }
            for removed, entry in _read(file).items()
        }


def _add_repair(home: Path, cell: Cell, report: Path, name: str) -> None:
    """Add what one audit measured."""
    part = "/".join(report.parts[-4:-2])
    note = _note(home, report.parents[1], f"{name}/{part}", "remediate")
    if note is None:
        return
    audit = _read(report)
    cell["before"], after = (
        {
            "psr": audit[moment]["psr"]["value"],
            "accuracy": audit[moment]["clean_accuracy"]["value"],
            "robust_accuracy": audit[moment]["robust_accuracy"]["value"],
        }
        for moment in ("before", "after")
    )
    cell["repairs"][part] = after | {
        "settings": note["settings"],
        "cpu_seconds": _cost(note),
        "gradient_samples": audit["gradient_samples"]["remediate"],
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def of_attack(cells: Cells, world: str, attack: str) -> dict[str, Cell]:
    """Select the records of one attack by seed."""
    parts = {tuple(name.split("/")): cell for name, cell in cells.items()}
    return {
        seed: cell
        for (place, seed, other), cell in sorted(parts.items())
        if (place, other) == (world, attack)
    }


def values(cells: Cells, world: str, attack: str, *keys: str) -> Iterator[tuple[str, float]]:
    """Yield seed and figure of every seed that has the figure.

    Seeds on which the attack fails altogether are left out: there is nothing to trace or remove.
    """
    for seed, cell in of_attack(cells, world, attack).items():
        value = _look(cell, keys) if cell["success"] > 0 else None
        if value is not None:
            yield seed, float(value)


def _look(cell: Cell, keys: tuple[str, ...]) -> float | None:
    """Follow keys; None where a detector or an unlearner has not run."""
    value: Any = cell
    for depth, key in enumerate(keys):
        if depth < 3 and key not in value:
            return None
        value = value[key]
    return None if value is None else float(value)
