"""The gate: verdicts, exit codes, and evidence that does not match."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml
from torch import nn

from defense.artifacts import sha256_file, write_json
from defense.cli import main
from defense.errors import EvidenceError
from defense.gate import Policy, judge, verify, write_verdict
from defense.lineage import digest, verify_lineage, write_lineage
from defense.report import AuditReport, BlockQuality, Evidence, ModelQuality, Rate, read_report
from defense.storage import save_model


def quality(psr: int, correct: int, total: int = 100) -> ModelQuality:
    fooled = Rate.of(int(psr > 50), 1)
    return ModelQuality(
        psr=Rate.of(psr, total),
        clean_accuracy=Rate.of(correct, total),
        robust_accuracy=Rate.of(total - psr, total),
        affected_fooled=fooled,
    )


def block(*, suspected: bool = True, removed: int = 0) -> BlockQuality:
    return BlockQuality(
        label="3",
        num_rows=40,
        coherence=0.3,
        clean_coherence=0.1,
        agreement=0.0,
        usual_agreement=0.9,
        said="8",
        p_value=1e-9,
        suspected=suspected,
        planted=Rate.of(40, 40),
        removed=Rate.of(removed, 40),
    )


def make_home(
    home: Path,
    *,
    psr: int = 1,
    correct: int = 94,
    total: int = 100,
    blocks: Sequence[BlockQuality] | None = (),
    unchecked: Sequence[str] = (),
    in_part: Sequence[str] = (),
) -> Path:
    """Write a model, a report, a verdict, a lineage and a policy."""
    torch.manual_seed(0)
    digest = save_model(home / "artifacts" / "remediated", nn.Linear(2, 2), meta={})
    after = quality(psr, correct, total) if total else quality(0, 0, 0)
    report = AuditReport(
        before=quality(99, 95),
        after=after,
        detection=[],
        published=[],
        detector_verdict="poison found",
        incidents=[],
        num_train=10,
        num_flagged=2,
        emptied_classes=[],
        curvature="fast tier",
        affected=[],
        methods={},
        gradient_samples={"train": 1, "remediate": 1},
        success=True,
        psr_bound=0.05,
        accuracy_drop_bound=0.02,
        blocks=None if blocks is None else list(blocks),
        unchecked=list(unchecked),
        in_part=list(in_part),
        artifacts={"remediated": Evidence(path="artifacts/remediated", sha256=digest)},
    )
    file = home / "reports" / "audit.json"
    write_json(file, report.model_dump(mode="json"))
    for name in ("report.html", "flags.csv"):
        (home / "reports" / name).write_text(name)
    write_verdict(home / "reports", judge(report, sha256_file(file), Policy()))
    write_lineage(home)
    (home / "params.yaml").write_text("gate: {max_psr: 0.05, max_accuracy_drop: 0.02}\n")
    return home


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def run_gate(home: Path) -> int:
    return exit_code("gate", "--home", str(home))


def test_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = make_home(tmp_path)
    assert run_gate(home) == 0
    assert "Release gate: PASS" in capsys.readouterr().out
    assert exit_code("lineage", "verify", "--home", str(home)) == 0
    assert exit_code("lineage", "show", "--home", str(home)) == 0


@pytest.mark.parametrize("change", [{"psr": 6}, {"correct": 92}, {"psr": 90}, {"total": 0}])
def test_blocks(tmp_path: Path, change: dict[str, int]) -> None:
    home = make_home(tmp_path, **change)
    assert run_gate(home) == 1
    suite = ElementTree.parse(home / "reports" / "verdict.xml").getroot()
    assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure")) > 0


@pytest.mark.parametrize(("psr", "correct", "code"), [(5, 93, 0), (6, 93, 1), (5, 92, 1)])
def test_bounds_are_inclusive(tmp_path: Path, psr: int, correct: int, code: int) -> None:
    assert run_gate(make_home(tmp_path, psr=psr, correct=correct)) == code


@pytest.mark.parametrize(
    ("blocks", "code"),
    [
        ([block(removed=36)], 0),
        ([block(removed=35)], 1),
        ([block(suspected=False)], 0),
        (None, 1),
    ],
)
def test_suspected_blocks_that_are_still_trained_on_block(
    tmp_path: Path, blocks: list[BlockQuality] | None, code: int
) -> None:
    home = make_home(tmp_path, blocks=blocks)
    assert run_gate(home) == code
    (home / "params.yaml").write_text("gate: {max_open_blocks: null}\n")
    assert run_gate(home) == 0


def test_a_class_that_was_not_scanned_blocks(tmp_path: Path) -> None:
    assert run_gate(make_home(tmp_path, unchecked=["7"])) == 1


@pytest.mark.parametrize(
    ("found", "bound", "code"),
    [
        ({"in_part": ["a", "b"]}, None, 0),
        ({"in_part": ["a", "b"]}, 2, 0),
        ({"in_part": ["a", "b"]}, 1, 1),
        ({"blocks": None}, 9, 1),
    ],
)
def test_classes_not_looked_at_as_a_whole_block_if_the_policy_asks(
    tmp_path: Path, found: dict, bound: int | None, code: int
) -> None:
    home = make_home(tmp_path, **found)
    policy = yaml.safe_dump({"gate": {"max_open_blocks": None, "max_partly_scanned": bound}})
    (home / "params.yaml").write_text(policy)
    assert run_gate(home) == code


def test_a_class_that_was_not_scanned_was_not_looked_at_as_a_whole(tmp_path: Path) -> None:
    home = make_home(tmp_path, unchecked=["a"], in_part=["b"])
    assert read_report(home / "reports" / "audit.json").partly_scanned == 2


def test_a_stricter_policy_today_blocks_yesterdays_pass(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    (home / "params.yaml").write_text("gate: {max_psr: 0.001}\n")
    assert run_gate(home) == 1


@pytest.mark.parametrize(
    "policy",
    ["gate: {max_psr: 2}", "gate: {max_prs: 0.1}", "other: {}", ":", "gate: {max_psr: .nan}"],
)
def test_a_policy_that_is_not_valid_is_usage(
    tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    home = make_home(tmp_path)
    (home / "params.yaml").write_text(policy)
    assert run_gate(home) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_summary_that_cannot_be_written_is_usage(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    summary = str(tmp_path / "no" / "such" / "summary.md")
    assert exit_code("gate", "--home", str(home), "--summary", summary) == 2


def test_a_policy_that_is_not_utf8_is_usage(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    (home / "params.yaml").write_bytes(b"gate: {max_psr: 0.05} # \xe9")
    assert run_gate(home) == 2


@pytest.mark.parametrize(("psr", "code"), [(1, 0), (90, 1)])
def test_a_reader_that_has_gone_does_not_change_the_verdict(
    tmp_path: Path, psr: int, code: int
) -> None:
    home = make_home(tmp_path, psr=psr)
    command = f"import sys; from defense.cli import main; main(['gate', '--home', {str(home)!r}])"
    gate = [sys.executable, "-c", command]
    read, write = os.pipe()
    os.close(read)
    assert subprocess.run(gate, stdout=write, check=False).returncode == code
    os.close(write)


@pytest.mark.parametrize("arguments", [["gate", "--home", "/no/such"], ["gate", "--nope"], ["x"]])
def test_usage(arguments: list[str]) -> None:
    assert exit_code(*arguments) == 2


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


def test_a_crash_is_neither_pass_nor_blocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_args):
        raise ZeroDivisionError

    monkeypatch.setattr("defense.cli.verify", crash)
    assert run_gate(make_home(tmp_path)) == 70


def test_summary_is_appended(tmp_path: Path) -> None:
    home, summary = make_home(tmp_path), tmp_path / "summary.md"
    summary.write_text("before\n")
    assert exit_code("gate", "--home", str(home), "--summary", str(summary)) == 0
    assert summary.read_text().startswith("before\n## Release gate: PASS")


def test_verdict_names_report_and_model(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    verdict = verify(home, Policy())
    assert verdict.report_sha256 == sha256_file(home / "reports" / "audit.json")
    report = read_report(home / "reports" / "audit.json")
    assert verdict.model_sha256 == report.artifacts["remediated"].sha256
    assert verify_lineage(home) == []


def test_needs_no_torch() -> None:
    """Torch would cost seconds, and a gate must run where no framework is installed."""
    code = "import sys, defense.cli; print(sorted({'torch', 'mlflow', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rate_is_wilson() -> None:
    rate = Rate.of(1, 100)
    assert rate.value == 0.01
    assert (round(rate.low, 4), round(rate.high, 4)) == (0.0018, 0.0545)
    assert Rate.of(0, 0).value is None


@pytest.mark.parametrize(
    ("check", "after", "policy"),
    [
        ("psr", {"psr": Rate.of(6, 100)}, {}),
        ("accuracy_drop", {"clean_accuracy": Rate.of(92, 100)}, {}),
        ("clean_accuracy", {}, {"min_clean_accuracy": 0.95}),
        ("affected_fooled", {"affected_fooled": Rate.of(1, 3)}, {}),
        ("open_blocks", {}, {}),
    ],
)
def test_every_check_blocks_alone(tmp_path: Path, check: str, after: dict, policy: dict) -> None:
    report = read_report(make_home(tmp_path) / "reports" / "audit.json")
    changed = report.model_copy(
        update={
            "after": report.after.model_copy(update=after),
            "blocks": [block()] if check == "open_blocks" else [],
        }
    )
    assert judge(report, "0" * 64, Policy()).passed
    verdict = judge(changed, "0" * 64, Policy(**policy))
    assert [found.id for found in verdict.checks if not found.passed] == [check]
    assert not verdict.passed


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
