"""What the cells of ``pipelines/paper`` found, gathered into one record per attack and seed."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.record import RESULTS, hardware
from defense.metrics import detection_quality
from defense.storage import load_flags, load_truth

HOME = Path(__file__).parents[1] / "pipelines" / "paper"
STORE = RESULTS / "paper.json"
FOUND = ("tpr", "precision")

Cell = dict[str, Any]
Cells = dict[str, Cell]


def gather(home: Path = HOME, store: Path = STORE) -> Cells:
    """Collect all cells on this machine, on top of those that were kept before.

    A record that was kept under other parameters is dropped.

    Args:
        home: Folder of the matrix, with its params.yaml and cells.
        store: Results that were kept.

    Returns:
        Records by ``world/seed/attack``, each with the digest of the parameters they hang on.
    """
    matrix = yaml.safe_load((home / "params.yaml").read_text(encoding="utf-8"))
    kept: Cells = json.loads(store.read_text())["cells"] if store.is_file() else {}
    cells = {name: cell for name, cell in kept.items() if cell["settings"] == _key(matrix, name)}
    for cell in cells.values():
        for part in ("detectors", "repairs"):
            cell[part] = {
                name: record
                for name, record in cell[part].items()
                if record["settings"] == _method_key(matrix, name)
            }
    for folder in sorted((home / "cells").glob("*/*/*")):
        if (folder / "metrics" / "train.json").is_file():
            name = "/".join(folder.parts[-3:])
            found = _attack(folder, matrix, name)
            old = cells.get(name, {"detectors": {}, "repairs": {}})
            merged = {part: old[part] | found[part] for part in ("detectors", "repairs")}
            cells[name] = old | found | merged
    return cells


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _key(matrix: Any, name: str) -> str | None:
    """Digest the parameters that a whole record hangs on; None if they are gone."""
    world, _, attack = name.split("/")
    place = matrix["worlds"].get(world, {})
    if attack not in place.get("attacks", {}):
        return None
    sections = {key: value for key, value in place.items() if key != "attacks"}
    scored = {key: matrix["shared"][key] for key in ("factors", "transforms", "scores")}
    return _digest([sections, place["attacks"][attack], scored])


def _method_key(matrix: Any, name: str) -> str:
    """Digest the settings of a detector, or of a detector and an unlearner."""
    detector, _, unlearner = name.partition("/")
    return _digest([matrix["detectors"].get(detector), matrix["unlearners"].get(unlearner)])


def _attack(folder: Path, matrix: Any, name: str) -> Cell:
    cell: Cell = {
        "settings": _key(matrix, name),
        "hardware": hardware(),
        "success": _read(folder / "metrics" / "train.json")["success"],
        "detectors": {},
        "repairs": {},
    }
    truth, _ = load_truth(folder / "artifacts" / "truth")
    for place in sorted(folder.glob("*/artifacts/flags")):
        detector, (flags, _) = place.parents[1], load_flags(place)
        quality = {entry.rows: entry for entry in detection_quality(flags, truth)}
        cell["detectors"][detector.name] = {
            "settings": _method_key(matrix, detector.name),
            "seconds": _seconds(detector / "metrics" / "detect.seconds.json"),
            "flagged": int(flags.mask.sum()),
        } | {
            rows: {key: getattr(entry, key).value for key in FOUND}
            | {"average_precision": entry.average_precision}
            for rows, entry in quality.items()
        }
    for report in sorted(folder.glob("*/*/reports/audit.json")):
        _add_repair(cell, matrix, report)
    for file in sorted(folder.glob("*/metrics/counterfactual.json")):
        cell["detectors"][file.parts[-3]]["counterfactual"] = {
            removed: {
                "removed": entry["removed"],
                "psr": entry["psr"]["value"],
                "accuracy": entry["clean_accuracy"]["value"],
            }
            for removed, entry in _read(file).items()
        }
    return cell


def _add_repair(cell: Cell, matrix: Any, report: Path) -> None:
    """Add what one audit measured."""
    detector, unlearner = report.parts[-4:-2]
    audit, name = _read(report), f"{detector}/{unlearner}"
    cell["before"] = {
        "psr": audit["before"]["psr"]["value"],
        "accuracy": audit["before"]["clean_accuracy"]["value"],
    }
    cell["repairs"][name] = {
        "settings": _method_key(matrix, name),
        "psr": audit["after"]["psr"]["value"],
        "accuracy": audit["after"]["clean_accuracy"]["value"],
        "gradient_samples": audit["gradient_samples"]["remediate"],
        "seconds": _seconds(report.parents[1] / "metrics" / "remediate.seconds.json"),
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _seconds(path: Path) -> float | None:
    """Read how long a stage took; None if that is not known, or it was killed and resumed."""
    seconds = _read(path)["seconds"] if path.is_file() else None
    return None if seconds is None else float(seconds)


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
