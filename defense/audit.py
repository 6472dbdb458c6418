"""The audit: measure before and after, with the truth in hand, and write the report."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from torch import nn

from defense.artifacts import Manifest, cell
from defense.evidence import Confirmation, LabelDoubts, Scan
from defense.method import Method
from defense.metrics import detection_quality, model_quality, rate
from defense.prediction import predict
from defense.records import Flags, ImageSet, Truth
from defense.report import (
    Affected,
    AuditReport,
    BlockQuality,
    ConfirmationCurve,
    CurvePoint,
    Evidence,
    IncidentQuality,
    ModelQuality,
    drop,
)
from defense.storage import blinded


class AuditSettings(Method):
    """What counts as success.

    Attributes:
        psr_bound: The poison success rate must stay below this; the paper's is 5 %.
        accuracy_drop_bound: Clean accuracy may drop by this fraction at most.
    """

    psr_bound: float = Field(0.05, gt=0, le=1)
    accuracy_drop_bound: float = Field(0.02, ge=0, le=1)


@dataclass(frozen=True)
class Exhibits:
    """What an audit looks at.

    Attributes:
        train: The poisoned train set.
        test: The clean test set.
        probe: The triggered test images.
        truth: What was planted.
        affected: The inputs the investigation started from, labelled as predicted.
        flags: The detector's answer.
        published: That of the published rule.
        before: The suspect model.
        after: The remediated model.
        scan: What a scan of all rows found, if there was one.
        doubts: What speaks against the labels, by the same scan.
        confirmation: What unlearning the flagged rows did to the wrong predictions.
    """

    train: ImageSet
    test: ImageSet
    probe: ImageSet
    truth: Truth
    affected: ImageSet
    flags: Flags
    published: Flags
    before: nn.Module
    after: nn.Module
    scan: Scan | None = None
    doubts: LabelDoubts | None = None
    confirmation: Confirmation | None = None


def evidence(manifests: Mapping[str, tuple[Path, Manifest]]) -> dict[str, Evidence]:
    """Seal artefacts by the digest of their manifests."""
    return {
        name: Evidence(path=path.as_posix(), sha256=manifest.digest, inputs=manifest.inputs)
        for name, (path, manifest) in manifests.items()
    }


def measure(exhibits: Exhibits, model: nn.Module, label: str) -> ModelQuality:
    """Measure one model on the test set and the probe."""
    return model_quality(
        predict(model, exhibits.test, label=f"test, {label}"),
        predict(model, exhibits.probe, label=f"probe, {label}"),
        exhibits.test,
        exhibits.probe,
        exhibits.truth,
        exhibits.affected.ids,
        predict(model, exhibits.affected, label=f"affected, {label}") == exhibits.affected.labels,
    )


def is_success(before: ModelQuality, after: ModelQuality, settings: AuditSettings) -> bool:
    """Tell whether the poison is gone and accuracy kept; what was not measured fails."""
    psr, lost = after.psr.value, drop(before.clean_accuracy, after.clean_accuracy)
    if psr is None or lost is None:
        return False
    return psr < settings.psr_bound and lost <= settings.accuracy_drop_bound


def audit(
    exhibits: Exhibits,
    settings: AuditSettings,
    *,
    curvature: str,
    methods: dict[str, Any],
    gradient_samples: dict[str, int],
    artifacts: dict[str, Evidence],
) -> AuditReport:
    """Measure both models and the detector.

    Args:
        exhibits: What to look at.
        settings: What counts as success.
        curvature: What the influence functions were fitted on.
        methods: Settings of every method that took part, by params section.
        gradient_samples: Per-sample gradients spent, by stage.
        artifacts: Digest of every artefact that was used.
    """
    before = measure(exhibits, exhibits.before, "before")
    after = measure(exhibits, exhibits.after, "after")
    return AuditReport(
        before=before,
        after=after,
        detection=detection_quality(exhibits.flags, exhibits.truth),
        published=detection_quality(exhibits.published, exhibits.truth),
        detector_verdict=exhibits.flags.verdict,
        incidents=incidents(exhibits),
        num_train=len(exhibits.train),
        num_flagged=int(exhibits.flags.mask.sum()),
        emptied_classes=emptied_classes(exhibits.train, exhibits.flags),
        affected=_affected(exhibits),
        curvature=curvature,
        methods=methods,
        gradient_samples=gradient_samples,
        success=is_success(before, after, settings),
        psr_bound=settings.psr_bound,
        accuracy_drop_bound=settings.accuracy_drop_bound,
        confirmation=None if exhibits.confirmation is None else _curve(exhibits.confirmation),
        unchecked=_names(exhibits, "unchecked"),
        in_part=_names(exhibits, "in_part"),
        blocks=None if exhibits.scan is None else _blocks(exhibits, exhibits.scan),
        artifacts=artifacts,
    )


def emptied_classes(train: ImageSet, flags: Flags) -> list[str]:
    """Name the classes all of whose rows are flagged."""
    left = np.bincount(train.labels[~flags.mask], minlength=train.num_classes)
    return [name for name, count in zip(train.class_names, left, strict=True) if count == 0]


def _affected(exhibits: Exhibits) -> list[Affected]:
    names, inputs = exhibits.train.class_names, exhibits.affected
    classes = (names[label] for label in exhibits.truth.probe_labels)
    true = dict(zip(exhibits.probe.ids.tolist(), classes, strict=True))
    return [
        Affected(id=name, predicted=names[label], true=true.get(name))
        for name, label in zip(inputs.ids.tolist(), inputs.labels, strict=True)
    ]


def incidents(exhibits: Exhibits) -> list[IncidentQuality]:
    """Tell what the affected inputs implicate, by the names of classes and inputs."""
    test = exhibits.test.ids.tolist()
    clean = dict(zip(blinded(exhibits.test).ids.tolist(), test, strict=True))
    return [
        IncidentQuality(
            affected=[str(exhibits.affected.ids[number]) for number in incident.affected],
            label=exhibits.train.class_names[incident.label],
            p_value=incident.p_value,
            num_controls=incident.num_controls,
            num_flagged=incident.num_flagged,
            false_discovery_rate=incident.false_discovery_rate,
            precision=incident.precision,
            p_value_left=incident.p_value_left,
            enrichment=_by_label(incident.enrichment, exhibits.train.class_names),
            rival=None if incident.rival is None else exhibits.train.class_names[incident.rival],
            untold=incident.untold,
            alike=[clean[name] for name in incident.alike],
        )
        for incident in exhibits.flags.incidents
    ]


def _by_label(values: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    """Name values of labels, the largest first."""
    pairs = zip(names, values, strict=False)  # nothing was noted by earlier versions
    return dict(sorted(pairs, key=lambda pair: -pair[1]))


def _curve(confirmation: Confirmation) -> ConfirmationCurve:
    points = [
        CurvePoint(rows=rows, flagged=flagged, others=others)
        for rows, flagged, others in confirmation.points
    ]
    return ConfirmationCurve(
        before=confirmation.before,
        points=points,
        cut=confirmation.cut,
        spoilt=confirmation.spoilt,
    )


def _names(exhibits: Exhibits, which: str) -> list[str]:
    labels = () if exhibits.scan is None else getattr(exhibits.scan, which)
    return [exhibits.train.class_names[label] for label in labels]


def _blocks(exhibits: Exhibits, scan: Scan) -> list[BlockQuality]:
    names = exhibits.train.class_names
    return [
        BlockQuality(
            label=names[block.label],
            num_rows=int(block.rows.sum()),
            coherence=block.coherence,
            clean_coherence=block.clean_coherence,
            agreement=block.agreement,
            usual_agreement=block.usual_agreement,
            said=names[block.said],
            p_value=block.p_value,
            suspected=block.suspected,
            lacking=block.lacking,
            unclear=block.unclear,
            alike=list(block.alike),
            planted=rate(exhibits.truth.poisoned[block.rows]),
            removed=rate(exhibits.flags.mask[block.rows]),
        )
        for block in scan.blocks
    ]


def labels_csv(train: ImageSet, doubts: LabelDoubts) -> str:
    """List the hundredth of the rows, ten or more, whose labels are doubted most, as CSV."""
    text, names = io.StringIO(), train.class_names
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["row", "id", "label", "suggested", "doubt"])
    for row in doubts.doubtful(max(10, len(train) // 100)):
        labels = cell(names[train.labels[row]]), cell(names[doubts.suggested[row]])
        table.writerow([row, cell(train.ids[row]), *labels, f"{doubts.doubt[row]:.6g}"])
    return text.getvalue()


def flags_csv(train: ImageSet, flags: Flags) -> str:
    """List the flagged rows, most suspicious first, as CSV; p-values by a detector that has any."""
    rows = np.flatnonzero(flags.mask)
    order = rows[np.argsort(-flags.suspicion[rows], kind="stable")]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["row", "id", "label", "suspicion", "p_value"])
    for row in order:
        name, label = cell(train.ids[row]), cell(train.class_names[train.labels[row]])
        p_value = "" if flags.p_values is None else f"{flags.p_values[row]:.6g}"
        table.writerow([row, name, label, f"{flags.suspicion[row]:.6g}", p_value])
    return text.getvalue()
