"""The gate: what it checks, its verdicts and its exit codes."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from defense.gate import Policy, judge
from defense.report import BlockQuality, Rate, read_report
from tests.unit.homes import block, exit_code, make_home, run_gate


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


@pytest.mark.parametrize(("removed", "code"), [(35, 1), (36, 0)])
def test_a_block_that_cannot_be_vouched_for_blocks(tmp_path: Path, removed: int, code: int) -> None:
    unclear = block(suspected=False, removed=removed).model_copy(update={"unclear": True})
    assert run_gate(make_home(tmp_path, blocks=[unclear])) == code


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


def test_an_interrupted_command_is_no_verdict_and_no_bug(monkeypatch, tmp_path: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    home = make_home(tmp_path)
    monkeypatch.setattr("defense.cli.verify", interrupted)
    assert run_gate(home) == 130


@pytest.mark.parametrize("arguments", [["gate", "--home", "/no/such"], ["gate", "--nope"], ["x"]])
def test_usage(arguments: list[str]) -> None:
    assert exit_code(*arguments) == 2


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


@pytest.mark.parametrize(("images", "passed"), [(1, False), (72, False), (73, True)])
def test_few_images_do_not_vouch_for_all_if_the_policy_asks(
    tmp_path: Path, images: int, passed: bool
) -> None:
    report = read_report(make_home(tmp_path) / "reports" / "audit.json")
    after = report.after.model_copy(update={"psr": Rate.of(0, images)})
    report = report.model_copy(update={"after": after})
    assert judge(report, "0" * 64, Policy()).passed
    assert judge(report, "0" * 64, Policy(max_psr_high=0.05)).passed is passed


@pytest.mark.parametrize(
    ("check", "after", "policy"),
    [
        ("psr", {"psr": Rate.of(6, 100)}, {}),
        ("accuracy_drop", {"clean_accuracy": Rate.of(92, 100)}, {}),
        ("clean_accuracy", {}, {"min_clean_accuracy": 0.95}),
        ("affected_fooled", {"affected_fooled": Rate.of(1, 3)}, {}),
        ("psr_high", {"psr": Rate.of(0, 1)}, {"max_psr_high": 0.05}),
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
