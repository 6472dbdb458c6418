"""Lineage: which bytes were computed from which, from the data to the verdict. No torch."""

import hashlib
import json
from pathlib import Path
from typing import Any

from defense.artifacts import open_artifact, read_manifest, sha256_file, to_json, write_json
from defense.errors import ArtifactError, EvidenceError
from defense.report import read_report

LINEAGE = Path("reports/lineage.json")
FILES = {
    "report": Path("reports/audit.json"),
    "page": Path("reports/report.html"),
    "flagged_rows": Path("reports/flags.csv"),
    "verdict": Path("reports/verdict.json"),
}


def collect(home: Path) -> dict[str, Any]:
    """Link every artefact the audit saw, the report and the verdict by sha256.

    Args:
        home: The folder that holds ``reports`` and ``artifacts``.

    Returns:
        ``nodes``: name to path, kind, sha256 and the sha256 of its inputs by role;
        ``digest``: sha256 of the nodes, the name of this lineage.
    """
    report = read_report(home / FILES["report"])
    nodes: dict[str, Any] = {
        name: {
            "path": evidence.path,
            "kind": read_manifest(home / evidence.path).kind,
            "sha256": evidence.sha256,
            "inputs": evidence.inputs,
        }
        for name, evidence in report.artifacts.items()
    }
    seen = {name: node["sha256"] for name, node in nodes.items()}
    hashes = {name: sha256_file(home / path) for name, path in FILES.items()}
    judged = {"report": hashes["report"], "remediated": seen["remediated"]}
    inputs = dict.fromkeys(FILES, seen) | {"verdict": judged}
    nodes |= {name: _file_node(name, hashes[name], inputs[name]) for name in FILES}
    return {"version": 1, "digest": digest(nodes), "nodes": nodes}


def _file_node(name: str, sha256: str, inputs: dict[str, str]) -> dict[str, Any]:
    return {"path": FILES[name].as_posix(), "kind": name, "sha256": sha256, "inputs": inputs}


def digest(nodes: dict[str, Any]) -> str:
    """Return the sha256 of the nodes in canonical JSON."""
    return hashlib.sha256(to_json(nodes).encode()).hexdigest()


def write_lineage(home: Path) -> dict[str, Any]:
    """Collect the lineage and write it to ``reports/lineage.json``."""
    lineage = collect(home)
    write_json(home / LINEAGE, lineage)
    return lineage


def read_lineage(home: Path) -> dict[str, Any]:
    """Read a lineage file and check its own digest.

    Raises:
        EvidenceError: The file is missing, not a lineage, or was edited.
    """
    file = home / LINEAGE
    if not file.is_file():
        raise EvidenceError(f"expected a lineage at {file}, found none; run: dvc repro gate")
    try:
        lineage: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        intact = digest(lineage["nodes"]) == lineage["digest"]
        for node in lineage["nodes"].values():
            _ = node["path"], node["kind"], node["sha256"], node["inputs"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvidenceError(f"{file} is not a lineage ({error}); run: dvc repro gate") from error
    if not intact:
        raise EvidenceError(f"{file} was edited: its digest does not match; run: dvc repro gate")
    return lineage


def verify_lineage(home: Path) -> list[str]:
    """Hash every file of a lineage again.

    Returns:
        One line per node or link that does not hold; empty if all do.

    Raises:
        EvidenceError: There is no intact lineage file.
    """
    nodes = read_lineage(home)["nodes"]
    known = {node["sha256"] for node in nodes.values()}
    problems = [line for name, node in nodes.items() if (line := _broken(home, name, node))]
    loose = [
        f"{name}: its input {role} {sha256[:12]}… is not part of this lineage"
        for name, node in nodes.items()
        for role, sha256 in node["inputs"].items()
        if sha256 not in known
    ]
    return problems + loose


def require_intact(home: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Hash some nodes of a lineage again.

    Returns:
        The sha256 of each node, by name.

    Raises:
        EvidenceError: There is no intact lineage, a node is not in it, or one does not hold.
    """
    nodes = read_lineage(home)["nodes"]
    for name in names:
        problem = _broken(home, name, nodes[name]) if name in nodes else f"{name}: not recorded"
        if problem is not None:
            raise EvidenceError(problem)
    return {name: nodes[name]["sha256"] for name in names}


def _broken(home: Path, name: str, node: dict[str, Any]) -> str | None:
    """Describe what is wrong with one node's bytes, if anything is."""
    path = home / node["path"]
    try:
        if name not in FILES:
            manifest = open_artifact(path, node["kind"])
            actual, inputs = manifest.digest, manifest.inputs
        elif path.is_file():
            actual, inputs = sha256_file(path), node["inputs"]
        else:
            return f"{name}: {path} is missing; run: dvc repro"
    except ArtifactError as error:
        return f"{name}: {error}"
    if actual != node["sha256"]:
        return f"{name}: expected sha256 {node['sha256'][:12]}…, got {actual[:12]}…; run: dvc repro"
    return None if inputs == node["inputs"] else f"{name}: its recorded inputs differ"
