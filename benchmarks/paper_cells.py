"""What the cells of ``pipelines/paper`` found, gathered into one record per suspect model."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS
from defense.artifacts import read_manifest
from defense.errors import DefenseError
from defense.metrics import detection_quality
from defense.records import Truth
from defense.storage import load_flags, load_truth
from pipelines.matrix import read_cell, settings_of
from pipelines.params import read_yaml
from pipelines.paths import REFERENCES

HOME = Path(__file__).parents[1] / "pipelines" / "paper"
STORE = RESULTS / "paper.json"
FOUND = ("tpr", "precision")
PARTS = ("detectors", "repairs")
ATTACK_STAGES = ("factors", "influence", "directions")  # of which detectors need some

Record = dict[str, Any]
Cells = dict[str, dict[str, Record]]  # of a name and a suspect


def gather(home: Path = HOME, store: Path = STORE) -> Cells:
    """Collect all cells on this machine, on top of those that were kept before.

    A record that was made under other parameters is dropped, and a detector's or repair's that is
    in no list of the matrix any more. Detectors and repairs are kept with the suspect model that
    they looked at: the same cell trained on another machine is another model.

    Args:
        home: Folder of the matrix, with its params.yaml, dvc.yaml and cells.
        store: Results that were kept.

    Returns:
        Records by ``world/seed/attack`` and the digest of the suspect, each with the digest of
        the parameters they hang on.
    """
    kept: Cells = json.loads(store.read_text())["cells"] if store.is_file() else {}
    listed = _listed(home)
    cells: Cells = {}
    for name, suspects in kept.items():
        for suspect, cell in suspects.items():
            if cell["settings"] == _settings(home, name, "influence"):
                parts = {key: _current(home, name, cell[key], listed) for key in PARTS}
                cells.setdefault(name, {})[suspect] = cell | parts
    for folder in sorted((home / "cells").glob("*/*/*")):
        name = "/".join(folder.parts[-3:])
        if noted(home, name, "train") is not None:
            suspect, found = _attack(home, folder, name)
            old = cells.setdefault(name, {}).get(suspect, {part: {} for part in PARTS})
            merged = {part: old[part] | found[part] for part in PARTS}
            cells[name][suspect] = old | found | merged
    return cells


def _listed(home: Path) -> set[str]:
    """Name all detectors, references and repairs ``detector/unlearner`` of the matrix."""
    lists = read_yaml(home / "dvc.yaml")["vars"][1]["of"]
    detectors = {
        entry["name"] for key in ("detectors", "detectors_of_many") for entry in lists[key]
    }
    repairs = {
        f"{entry['detector']}/{entry['unlearner']}"
        for key in ("repairs", "repairs_of_many")
        for entry in lists[key]
    }
    return detectors | repairs | set(REFERENCES)


def _current(
    home: Path, name: str, records: dict[str, Record], listed: set[str]
) -> dict[str, Record]:
    """Keep the records that were made under the parameters of today."""
    return {
        part: record
        for part, record in records.items()
        if part in listed and record["settings"] == _settings(home, f"{name}/{part}", _stage(part))
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


def noted(home: Path, cell: str, stage: str) -> Record | None:
    """Read what a stage noted when it ran; None if it has not, or under other parameters."""
    path = home / "cells" / cell / "metrics" / f"{stage}.run.json"
    note = _read(path) if path.is_file() else None
    current = note is not None and note["settings"] == _settings(home, cell, stage)
    return note if current else None


def _cost(note: Record) -> float | None:
    """CPU seconds of a stage; None where an accelerator did the work, or a run was resumed."""
    seconds: float | None = note["cpu_seconds"] if note["device"] == "cpu" else None
    return seconds


def _attack(home: Path, folder: Path, name: str) -> tuple[str, Record]:
    """Name the suspect of a cell, and gather what is about it."""
    truth, planted = load_truth(folder / "artifacts" / "truth")
    suspect = read_manifest(folder / "artifacts" / "affected").inputs["suspect"]
    ours = {"poisoned_train": planted.inputs["poisoned_train"], "suspect": suspect}
    stages = {stage: noted(home, name, stage) for stage in ATTACK_STAGES}
    trained = _read(folder / "metrics" / "train.run.json")
    where = {key: trained[key] for key in ("device", "torch")}
    cell: Record = {
        "settings": _settings(home, name, "influence"),
        "hardware": trained.get("hardware", {}) | where if where["device"] == "cpu" else where,
        "success": _read(folder / "metrics" / "train.json")["success"],
        "cpu_seconds": {stage: _cost(note) for stage, note in stages.items() if note},
        "detectors": {},
        "repairs": {},
    }
    for place in sorted(folder.glob("*/artifacts/flags")):
        if all(ours.get(role, made) == made for role, made in read_manifest(place).inputs.items()):
            _add_detector(home, cell, place, name, truth)
    for report in sorted(folder.glob("*/*/reports/audit.json")):
        if _read(report)["artifacts"]["suspect"]["sha256"] == suspect:
            _add_repair(home, cell, report, name)
    return suspect[:12], cell


def _add_detector(home: Path, cell: Record, place: Path, name: str, truth: Truth) -> None:
    """Add what a detector flagged, and what the counterfactuals made of it."""
    folder = place.parents[1]
    note = noted(home, f"{name}/{folder.name}", _stage(folder.name))
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
    if noted(home, f"{name}/{folder.name}", "counterfactual") is not None:
        cell["detectors"][folder.name]["counterfactual"] = {
            removed: {"removed": entry["removed"]}
            | {
                short: [model[key]["value"] for model in entry["trainings"]]
                for short, key in (("psr", "psr"), ("accuracy", "clean_accuracy"))
            }
            for removed, entry in _read(file).items()
        }


def _add_repair(home: Path, cell: Record, report: Path, name: str) -> None:
    """Add what one audit measured."""
    part = "/".join(report.parts[-4:-2])
    note = noted(home, f"{name}/{part}", "remediate")
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
    cell["images"] = {
        "psr": audit["before"]["psr"]["total"],
        "accuracy": audit["before"]["clean_accuracy"]["total"],
    }
    cell["repairs"][part] = after | {
        "settings": note["settings"],
        "seconds": note["seconds"],
        "gradient_samples": audit["gradient_samples"]["remediate"],
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def of_attack(cells: Cells, world: str, attack: str) -> dict[str, list[Record]]:
    """Select the records of one attack by seed, of every suspect, those most repaired first."""
    return {
        name.split("/")[1]: sorted(suspects.values(), key=_length, reverse=True)
        for name, suspects in sorted(cells.items())
        if (name.split("/")[0], name.split("/")[2]) == (world, attack)
    }


def _length(cell: Record) -> tuple[int, int]:
    return len(cell["repairs"]), len(cell["detectors"])


def chosen(cells: Cells, world: str, attack: str, *keys: str) -> dict[str, Record]:
    """Choose for every seed the suspect with most repairs that has a figure.

    Of suspects of several devices, those of the one on which most seeds have it: so seeds of one
    mean are of one time, as far as they can be. Models on which the attack fails altogether are
    left out: there is nothing to trace or remove.
    """
    able = {
        seed: [cell for cell in suspects if cell["success"] > 0 and _look(cell, keys) is not None]
        for seed, suspects in of_attack(cells, world, attack).items()
    }
    devices = Counter(
        device for own in able.values() for device in {cell["hardware"]["device"] for cell in own}
    )
    return {
        seed: max(own, key=lambda cell: devices[cell["hardware"]["device"]])
        for seed, own in able.items()
        if own
    }


def values(
    cells: Cells, world: str, attack: str, *keys: str, of: tuple[str, ...] | None = None
) -> Iterator[tuple[str, float]]:
    """Yield seed and figure of every seed that has the figure.

    Args:
        cells: All records.
        world: Data set.
        attack: Attack.
        keys: Where the figure is.
        of: Where another one is that must be of the same suspect; `keys` if None.
    """
    for seed, cell in chosen(cells, world, attack, *(of or keys)).items():
        value = _look(cell, keys)
        if value is not None:
            yield seed, float(value)


def of_others(
    cells: Cells, world: str, attack: str, *keys: str, than: tuple[str, ...] = ()
) -> bool:
    """Tell whether a figure is of other models than another one.

    Args:
        cells: All records.
        world: Data set.
        attack: Attack.
        keys: Where the figure is.
        than: Where the other one is; if empty, it is of those models that most figures are of.
    """
    first = {seed: suspects[0] for seed, suspects in of_attack(cells, world, attack).items()}
    if than:
        first = chosen(cells, world, attack, *than)
    used = chosen(cells, world, attack, *keys)
    return any(model is not first.get(seed) for seed, model in used.items())


def _look(cell: Record, keys: tuple[str, ...]) -> Any:
    """Follow keys; None where a detector or an unlearner has not run."""
    value: Any = cell
    for depth, key in enumerate(keys):
        if depth < 3 and key not in value:
            return None
        value = value[key]
    return value
