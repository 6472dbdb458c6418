"""One cell of a matrix of runs: its parameters and its folders.

The file of a matrix has the sections of params.yaml under ``shared``, and those that differ under
``worlds.<world>`` (data set, model, training) and ``worlds.<world>.attacks.<attack>``; a later one
replaces an earlier one. ``detectors`` and ``unlearners`` name variants of methods.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defense.errors import DefenseError
from pipelines.params import Params, read_yaml, validate
from pipelines.paths import REFERENCES, Paths

CELLS = Path("cells")
FORM = "<world>/<seed>/<attack>/<detector>/<unlearner>"
DEPTHS = (2, 3, 4, 5)  # names in a cell, by how far the run has come


def read_cell(path: Path, cell: str) -> tuple[Params, Paths]:
    """Read the parameters of one cell.

    Args:
        path: The matrix's parameter file.
        cell: World, seed, attack, detector and unlearner, as far as the stage needs them.
            What is not said stands for the first of its kind, which the stage does not use.

    Raises:
        DefenseError: The cell does not exist, or its parameters are not valid.
    """
    matrix, names = read_yaml(path), cell.split("/")
    if len(names) not in DEPTHS or not names[1].isdigit():
        raise DefenseError(
            f"expected a cell {FORM} or the first two or more of these, got '{cell}'"
        )
    world = _pick(matrix, "worlds", names[:1])
    attack = _pick(world, "attacks", names[2:3])
    sections = {**matrix.get("shared", {}), **world, **attack, "seed": int(names[1])}
    detector = [name for name in names[3:4] if name not in REFERENCES]
    sections["detector"] = _pick(matrix, "detectors", detector)
    sections["unlearner"] = _pick(matrix, "unlearners", names[4:5])
    del sections["attacks"]
    return validate(path, sections), _paths(names)


def _pick(mapping: Mapping[str, Any], section: str, name: list[str]) -> dict[str, Any]:
    """Return the named variant of a section, or its first one."""
    variants = mapping.get(section)
    if not isinstance(variants, dict) or not variants:
        raise DefenseError(f"expected a section '{section}' with named variants in the matrix")
    if name and name[0] not in variants:
        raise DefenseError(f"'{name[0]}' is not one of {section}: {', '.join(variants)}")
    return dict(variants[name[0] if name else next(iter(variants))])


def _paths(names: list[str]) -> Paths:
    folders = [CELLS.joinpath(*names[:depth]) for depth in DEPTHS]
    return Paths(*folders)
