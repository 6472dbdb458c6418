"""One cell of a matrix of runs: its parameters and its folders.

The file of a matrix holds, beside named variants of ``detectors`` and ``unlearners``, the sections
of params.yaml where they belong: under ``shared`` those all cells have in common, under
``worlds.<world>`` data set, model and training, under ``worlds.<world>.attacks.<attack>`` the
attack and the affected inputs. So DVC sees every section a stage uses by one name.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defense.errors import DefenseError
from pipelines.params import Params, read_yaml, validate
from pipelines.paths import DEPTHS, REFERENCES, Paths

CELLS = Path("cells")
PARTS = ("world", "seed", "attack", "detector", "unlearner")
SHARED = {"factors", "directions", "transforms", "scores", "audit", "gate", "tracking"}
WORLD = {"data", "model", "train", "attacks"}
ATTACK = {"attack", "affected"}
USES_DIRECTIONS = "normalised_influence"


def read_cell(path: Path, cell: str, stage: str) -> tuple[Params, Paths]:
    """Read the parameters of one cell.

    Args:
        path: The matrix's parameter file.
        cell: World, seed, attack, detector and unlearner, as far as the stage goes.
        stage: The stage that is to run. What is not part of its cell stands for the first of
            its kind, which the stage does not use.

    Raises:
        DefenseError: The stage has no such cell, or the parameters are not valid.
    """
    names, depth = cell.split("/"), DEPTHS.get(stage, 0)
    if len(names) != depth or not re.fullmatch("0|[1-9][0-9]*", names[1]):
        form = "/".join(f"<{part}>" for part in PARTS[:depth]) or "no cell"
        raise DefenseError(f"stage {stage}: expected {form}, got '{cell}'")
    if stage in ("detect", "reference") and (names[3] in REFERENCES) != (stage == "reference"):
        raise DefenseError(f"stage {stage} cannot give the flags of '{names[3]}'")
    matrix = _mapping(read_yaml(path), "the file", {"shared", "worlds", "detectors", "unlearners"})
    world = _mapping(_pick(matrix, "worlds", names[:1]), names[0], WORLD)
    attack = _mapping(_pick(world, "attacks", names[2:3]), "an attack", ATTACK)
    detector = [name for name in names[3:4] if name not in REFERENCES]
    sections = {**_mapping(matrix.get("shared"), "shared", SHARED), **world, **attack}
    sections["seed"] = int(names[1])
    sections["detector"] = _pick(matrix, "detectors", detector)
    sections["unlearner"] = _pick(matrix, "unlearners", names[4:5])
    del sections["attacks"]
    return validate(path, sections), Paths(*(CELLS.joinpath(*names[:end]) for end in range(2, 6)))


def settings_of(params: Params, paths: Paths, stage: str) -> str:
    """Digest the parameters that the result of a stage of a cell can depend on."""
    unused = {"audit", "gate", "tracking"} | ({"scan", "confirm"} - {stage})
    detects = DEPTHS[stage] >= 4 and paths.detection.name not in REFERENCES
    if not detects:
        unused |= {"detector"}
    if DEPTHS[stage] < 5:
        unused |= {"unlearner"}
    if stage != "directions" and not (detects and params.detector.name == USES_DIRECTIONS):
        unused |= {"directions"}
    known = params.model_dump_json(exclude=unused, exclude_none=True)  # new options leave it be
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def _mapping(value: Any, place: str, keys: set[str]) -> dict[str, Any]:
    """Require a mapping with some keys and no other."""
    if not isinstance(value, dict) or set(value) != keys:
        got = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise DefenseError(f"matrix: {place} needs the keys {', '.join(sorted(keys))}, got {got}")
    return value


def _pick(mapping: Mapping[str, Any], section: str, name: list[str]) -> Any:
    """Return the named variant of a section, or its first one."""
    variants = mapping[section]
    if not isinstance(variants, dict) or not variants:
        raise DefenseError(f"matrix: expected named variants in '{section}'")
    if name and name[0] not in variants:
        raise DefenseError(f"'{name[0]}' is not one of {section}: {', '.join(variants)}")
    return variants[name[0] if name else next(iter(variants))]
