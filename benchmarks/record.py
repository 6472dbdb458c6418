"""One shape for every result file: what was run, on what, and whether the bounds were met."""

import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from defense.artifacts import write_json
from defense.machine import hardware

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "dvc", "mlflow", "kronfluence")


def figure(
    name: str, values: Sequence[float], sense: Literal["<=", ">="], bound: float
) -> dict[str, Any]:
    """Summarise one measurement.

    Args:
        name: Id of the figure.
        values: One number per repetition; rates are fractions.
        sense: Whether the bound is an upper or a lower one.
        bound: What the mean has to reach.
    """
    mean = statistics.fmean(values)
    return {
        "id": name,
        "value": mean,
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
        "sense": sense,
        "bound": bound,
        "met": mean <= bound if sense == "<=" else mean >= bound,
    }


def versions() -> dict[str, str]:
    """Name the versions of Python and of what matters here."""
    return {"python": platform.python_version()} | {p: version(p) for p in PACKAGES}


def save(name: str, command: str, figures: list[dict[str, Any]], **details: Any) -> None:
    """Write ``benchmarks/results/<name>.json`` and print its figures as a table."""
    result = {
        "command": command,
        "hardware": hardware(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "figures": figures,
    }
    write_json(RESULTS / f"{name}.json", result | details)
    print("| figure | value | spread | n | bound | met |\n|---|---|---|---|---|---|")
    for row in figures:
        spread = "" if row["spread"] is None else f"{row['spread']:.4g}"
        bound = f"{row['sense']} {row['bound']:g}"
        print(
            f"| {row['id']} | {row['value']:.4g} | {spread} | {row['n']} | {bound} | {row['met']} |"
        )
