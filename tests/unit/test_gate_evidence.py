"""The gate against evidence that is missing, damaged, forged or about something else."""

import json
from pathlib import Path

import pytest
from torch import nn

from defense.artifacts import sha256_file, write_json
from defense.errors import EvidenceError
from defense.gate import Policy, judge, verify
from defense.lineage import digest, verify_lineage, write_lineage
from defense.report import read_report
from defense.storage import save_model
from tests.unit.homes import exit_code, make_home, run_gate


def spoil(home: Path, kind: str) -> None:
    """Damage one piece of evidence."""
    reports, model = home / "reports", home / "artifacts" / "remediated"
    weights = model / "weights.safetensors"
    if kind in ("audit.json", "verdict.json", "lineage.json"):
        (reports / kind).unlink()
    elif kind == "report edited":
        text = (reports / "audit.json").read_text().replace('"successes": 1', '"successes": 0')
        (reports / "audit.json").write_text(text)
    elif kind == "report truncated":
        (reports / "audit.json").write_text("{")
    elif kind == "weights edited":
        data = weights.read_bytes()
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif kind == "weights gone":
        weights.unlink()
    elif kind == "other model":
        save_model(model, nn.Linear(2, 2), meta={"other": True})
    elif kind.startswith("verdict edited"):
        raw = json.loads((reports / "verdict.json").read_text())
        write_json(reports / "verdict.json", raw | {"model_sha256": "0" * 64})
        if kind == "verdict edited and sealed":
            write_lineage(home)
    elif kind == "manifest of another type":
        write_json(model / "manifest.json", {"version": 1, "kind": "model", "files": []})
    elif kind == "node without a path":
        raw = json.loads((reports / "lineage.json").read_text())
        del raw["nodes"]["report"]["path"]
        write_json(reports / "lineage.json", raw | {"digest": digest(raw["nodes"])})
    elif kind == "lineage edited":
        raw = json.loads((reports / "lineage.json").read_text())
        raw["nodes"]["report"]["sha256"] = "0" * 64
        write_json(reports / "lineage.json", raw)


@pytest.mark.parametrize(
    "kind",
    [
        "audit.json",
        "verdict.json",
        "lineage.json",
        "lineage edited",
        "manifest of another type",
        "node without a path",
        "report edited",
        "report truncated",
        "weights edited",
        "weights gone",
        "other model",
        "verdict edited",
    ],
)
def test_evidence_that_does_not_match(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    home = make_home(tmp_path)
    spoil(home, kind)
    assert run_gate(home) == 3
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert exit_code("lineage", "verify", "--home", str(home)) == 3


def test_a_verdict_sealed_anew_about_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = make_home(tmp_path)
    spoil(home, "verdict edited and sealed")
    assert run_gate(home) == 3
    assert "about another model" in capsys.readouterr().err


def test_verdict_names_report_and_model(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    verdict = verify(home, Policy())
    assert verdict.report_sha256 == sha256_file(home / "reports" / "audit.json")
    report = read_report(home / "reports" / "audit.json")
    assert verdict.model_sha256 == report.artifacts["remediated"].sha256
    assert verify_lineage(home) == []


def test_a_verdict_forged_for_another_model_than_the_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = make_home(tmp_path)
    other = save_model(home / "artifacts" / "remediated", nn.Linear(2, 2), meta={"other": True})
    file = home / "reports" / "verdict.json"
    write_json(file, json.loads(file.read_text()) | {"model_sha256": other})
    nodes = json.loads((home / "reports" / "lineage.json").read_text())["nodes"]
    nodes["remediated"]["sha256"], nodes["verdict"]["sha256"] = other, sha256_file(file)
    sealed = {"nodes": nodes, "digest": digest(nodes)}
    write_json(home / "reports" / "lineage.json", sealed)
    assert run_gate(home) == 3
    assert "about another model" in capsys.readouterr().err


def test_a_verdict_sealed_anew_about_another_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = make_home(tmp_path)
    file = home / "reports" / "verdict.json"
    write_json(file, json.loads(file.read_text()) | {"report_sha256": "0" * 64})
    write_lineage(home)
    assert run_gate(home) == 3
    assert "about another report" in capsys.readouterr().err


def test_a_report_without_a_remediated_model_is_no_evidence(tmp_path: Path) -> None:
    report = read_report(make_home(tmp_path) / "reports" / "audit.json")
    with pytest.raises(EvidenceError, match="names no remediated model"):
        judge(report.model_copy(update={"artifacts": {}}), "0" * 64, Policy())
