"""What the cells of ``pipelines/paper`` found, gathered into one record per attack and seed."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "pipelines" / "paper" / "cells"
STORE = RESULTS / "paper.json"

Cell = dict[str, Any]
Cells = dict[str, Cell]


def gather(folder: Path = CELLS, store: Path = STORE) -> Cells:
    """Collect all cells on this machine, on top of those that were kept before.

    Returns:
        Records by ``world/seed/attack``.
    """
    cells: Cells = json.loads(store.read_text())["cells"] if store.is_file() else {}
    for home in sorted(folder.glob("*/*/*")):
        if (home / "metrics" / "train.json").is_file():
            found = _attack(home)
            kept = cells.setdefault("/".join(home.parts[-3:]), {"repairs": {}})
            kept["repairs"] |= found.pop("repairs")
            kept |= found
    return cells


def _attack(home: Path) -> Cell:
    train = _read(home / "metrics" / "train.json")
    cell: Cell = {"success": train["success"], "repairs": {}}
    for report in sorted(home.glob("*/*/reports/audit.json")):
        detector, unlearner = report.parts[-4:-2]
        place = report.parents[1]
        audit = _read(report)
        cell["repairs"][f"{detector}/{unlearner}"] = {
            "psr": audit["after"]["psr"]["value"],
            "accuracy": audit["after"]["clean_accuracy"]["value"],
            "robust_accuracy": audit["after"]["robust_accuracy"]["value"],
            "gradient_samples": audit["gradient_samples"]["remediate"],
            "seconds": _seconds(place / "metrics" / "remediate.seconds.json"),
            "detector_seconds": _seconds(place.parent / "metrics" / "detect.seconds.json"),
            "flagged": audit["num_flagged"],
            "detection": {
                entry["rows"]: {
                    "tpr": entry["tpr"]["value"],
                    "precision": entry["precision"]["value"],
                    "average_precision": entry["average_precision"],
                }
                for entry in audit["detection"]
            },
        }
        cell["before"] = {
            "psr": audit["before"]["psr"]["value"],
            "accuracy": audit["before"]["clean_accuracy"]["value"],
        }
    for file in home.glob("*/eu/metrics/counterfactual.json"):
        cell["counterfactual"] = {
            name: {
                "removed": entry["removed"],
                "psr": entry["psr"]["value"],
                "accuracy": entry["clean_accuracy"]["value"],
            }
            for name, entry in _read(file).items()
        }
    return cell


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _seconds(path: Path) -> float | None:
    return float(_read(path)["seconds"]) if path.is_file() else None


def values(cells: Cells, world: str, attack: str, pick: Callable[[Cell], Any]) -> Iterator[float]:
    """Yield a figure of every seed that has it."""
    for name, cell in sorted(cells.items()):
        one, _, other = name.split("/")
        if (one, other) == (world, attack):
            try:
                value = pick(cell)
            except KeyError:
                continue
            if value is not None:
                yield float(value)


def repair(detector: str, unlearner: str, *keys: str) -> Callable[[Cell], Any]:
    """Pick a figure of what one unlearner made of one detector's flags."""

    def pick(cell: Cell) -> Any:
        value: Any = cell["repairs"][f"{detector}/{unlearner}"]
        for key in keys:
            value = value[key]
        return value

    return pick
