"""The release gate: judge recorded evidence under a policy. No torch, well under a second."""

import json
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from defense.artifacts import to_json, write_text
from defense.errors import EvidenceError
from defense.lineage import FILES, require_intact
from defense.method import Method
from defense.report import AuditReport, read_report

GATED = ("report", "verdict", "remediated")  # what a decision rests on


class Policy(Method):
    """What a model must show to be released. Every bound is inclusive.

    Attributes:
        max_psr: Largest accepted poison success rate of the remediated model.
        max_psr_high: Largest accepted upper end of its 95 % interval, so that a few triggered
            images do not vouch for all (none of 72 leaves up to 5.1 %); null does not ask.
        max_accuracy_drop: Largest accepted loss of clean accuracy, as a fraction.
        min_clean_accuracy: Smallest accepted clean accuracy of the remediated model.
        max_affected_fooled: Largest accepted share of affected inputs that still get the
            label they were reported with.
        max_open_blocks: Most accepted blocks of rows that a scan suspects, or cannot vouch for,
            and of which less than nine tenths were flagged; null asks for no scan.
        max_partly_scanned: Most accepted classes that a scan could not look at as a whole, where
            poison with correct labels may go unseen; null does not ask.
    """

    max_psr: float = Field(0.05, ge=0, le=1)
    max_psr_high: float | None = Field(None, ge=0, le=1)
    max_accuracy_drop: float = Field(0.02, ge=-1, le=1)
    min_clean_accuracy: float = Field(0.0, ge=0, le=1)
    max_affected_fooled: float = Field(0.0, ge=0, le=1)
    max_open_blocks: int | None = Field(0, ge=0)
    max_partly_scanned: int | None = Field(None, ge=0)


class Check(BaseModel):
    """One comparison of a measured value with a bound; a value that is missing fails."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    value: float | None
    sense: Literal["<=", ">="]
    bound: float
    passed: bool


class Verdict(BaseModel):
    """The gate's answer, bound to the evidence by hash.

    Attributes:
        passed: Whether every check passed.
        checks: The comparisons.
        policy: The policy they come from.
        report_sha256: sha256 of the audit report that was judged.
        model_sha256: Digest of the remediated model that was audited.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    passed: bool
    checks: list[Check]
    policy: Policy
    report_sha256: str
    model_sha256: str


def _check(name: str, value: float | None, sense: Literal["<=", ">="], bound: float) -> Check:
    passed = value is not None and (value <= bound if sense == "<=" else value >= bound)
    return Check(id=name, value=value, sense=sense, bound=bound, passed=passed)


def judge(report: AuditReport, report_sha256: str, policy: Policy) -> Verdict:
    """Compare a report with a policy. A figure that was not measured blocks.

    Raises:
        EvidenceError: The report names no remediated model.
    """
    if "remediated" not in report.artifacts:
        raise EvidenceError("the audit report names no remediated model; run: dvc repro audit")
    after = report.after
    checks = [
        _check("psr", after.psr.value, "<=", policy.max_psr),
        _check("accuracy_drop", report.accuracy_drop, "<=", policy.max_accuracy_drop),
        _check("clean_accuracy", after.clean_accuracy.value, ">=", policy.min_clean_accuracy),
        _check("affected_fooled", after.affected_fooled.value, "<=", policy.max_affected_fooled),
    ]
    if policy.max_psr_high is not None:
        checks.append(_check("psr_high", after.psr.high, "<=", policy.max_psr_high))
    if policy.max_open_blocks is not None:
        checks.append(_check("open_blocks", report.open_blocks, "<=", policy.max_open_blocks))
    if policy.max_partly_scanned is not None:
        partly = report.partly_scanned
        checks.append(_check("partly_scanned", partly, "<=", policy.max_partly_scanned))
    return Verdict(
        passed=all(check.passed for check in checks),
        checks=checks,
        policy=policy,
        report_sha256=report_sha256,
        model_sha256=report.artifacts["remediated"].sha256,
    )


def write_verdict(folder: Path, verdict: Verdict) -> None:
    """Write the verdict as JSON, Markdown and JUnit XML into a folder."""
    write_text(folder / "verdict.json", to_json(verdict.model_dump()))
    write_text(folder / "verdict.md", to_markdown(verdict))
    write_text(folder / "verdict.xml", to_junit(verdict))


def to_markdown(verdict: Verdict) -> str:
    """Format a verdict for a job summary."""
    lines = [
        f"## Release gate: {'PASS' if verdict.passed else 'BLOCKED'}",
        "",
        "| check | measured | policy | result |",
        "|---|---|---|---|",
    ]
    for check in verdict.checks:
        value = "not measured" if check.value is None else f"{check.value:.4f}"
        result = "pass" if check.passed else "**blocked**"
        lines.append(f"| {check.id} | {value} | {check.sense} {check.bound:g} | {result} |")
    lines += ["", f"Report sha256 `{verdict.report_sha256}`  "]
    lines += [f"Model sha256 `{verdict.model_sha256}`", ""]
    return "\n".join(lines)


def to_junit(verdict: Verdict) -> str:
    """Format a verdict as JUnit XML, one test case per check."""
    failures = sum(not check.passed for check in verdict.checks)
    suite = ElementTree.Element(
        "testsuite", name="defense.gate", tests=str(len(verdict.checks)), failures=str(failures)
    )
    for check in verdict.checks:
        case = ElementTree.SubElement(suite, "testcase", classname="defense.gate", name=check.id)
        if not check.passed:
            text = f"measured {check.value}, policy {check.sense} {check.bound:g}"
            ElementTree.SubElement(case, "failure", message=text)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def read_verdict(path: Path) -> Verdict:
    """Read a verdict.

    Raises:
        EvidenceError: The file is missing or is not a verdict.
    """
    if not path.is_file():
        raise EvidenceError(f"expected a verdict at {path}, found none; run: dvc repro gate")
    try:
        return Verdict.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise EvidenceError(f"{path} is not a verdict ({reason}); run: dvc repro gate") from error


def verify(home: Path, policy: Policy) -> Verdict:
    """Judge the evidence in a pipeline's folder again, and check it against the recorded verdict.

    Args:
        home: The folder that holds ``reports`` and ``artifacts``.
        policy: The policy in force now, which may differ from the recorded one.

    Returns:
        The verdict under the policy in force.

    Raises:
        EvidenceError: The lineage, the report, the verdict or the remediated model is missing,
            or does not have the sha256 that was recorded for it.
    """
    sealed = require_intact(home, GATED)
    recorded = read_verdict(home / FILES["verdict"])
    verdict = judge(read_report(home / FILES["report"]), sealed["report"], policy)
    for what, sha256, expected in (
        ("report", recorded.report_sha256, sealed["report"]),
        ("model", recorded.model_sha256, sealed["remediated"]),
        ("model", verdict.model_sha256, sealed["remediated"]),
    ):
        if sha256 != expected:
            raise EvidenceError(
                f"the verdict is about another {what}: expected sha256 {expected[:12]}…, "
                f"got {sha256[:12]}…; run: dvc repro gate"
            )
    return verdict
