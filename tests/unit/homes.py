"""A folder with all the evidence the gate reads, and the gate run on it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from defense.artifacts import sha256_file, write_json
from defense.cli import main
from defense.gate import Policy, judge, write_verdict
from defense.lineage import write_lineage
from defense.report import AuditReport, BlockQuality, Evidence, ModelQuality, Rate
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
