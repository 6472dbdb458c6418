"""The audit report: the JSON that the gate, the HTML page and MLflow read. No torch."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from defense.errors import EvidenceError

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


REMOVED = 0.9  # share of a suspected block from which on it counts as removed


class Part(BaseModel):
    """Base of the report's parts: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Rate(Part):
    """A share with its denominator and Wilson 95 % interval.

    Attributes:
        value: successes / total in [0, 1]; None if total is 0.
        successes: The numerator.
        total: The denominator.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float | None
    successes: int
    total: int
    low: float
    high: float

    def __str__(self) -> str:
        """Format as a percentage with the counts it comes from."""
        share = "not measured" if self.value is None else f"{self.value:.1%}"
        return f"{share} ({self.successes:,} of {self.total:,})"

    @classmethod
    def of(cls, successes: int, total: int) -> "Rate":
        """Build a rate from counts; the interval of an empty denominator is [0, 1]."""
        if total == 0:
            return cls(value=None, successes=0, total=0, low=0.0, high=1.0)
        share, weight = successes / total, Z_95**2 / total
        centre = (share + weight / 2) / (1 + weight)
        spread = Z_95 / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
        low, high = max(0.0, centre - spread), min(1.0, centre + spread)
        return cls(value=share, successes=successes, total=total, low=low, high=high)


class ModelQuality(Part):
    """One model, measured.

    Attributes:
        psr: Poison success rate: triggered test images, other than the affected ones, whose
            true class is not the target and that the model sends to the target class.
        clean_accuracy: Untriggered test images classified rightly.
        robust_accuracy: The PSR's images classified as their true class (BackdoorBench's RA).
        affected_fooled: Affected inputs that still get the label they were reported with.
        without_trigger: The PSR's images that the model sends to the target class without the
            trigger, too: errors that no removal of poison ends.
    """

    psr: Rate
    clean_accuracy: Rate
    robust_accuracy: Rate
    affected_fooled: Rate
    without_trigger: Rate = Rate.of(0, 0)


class DetectionQuality(Part):
    """A detector's flags against the planted truth.

    Attributes:
        rows: Which rows the rule was applied to: ``all`` or ``predicted_label``.
        tpr: Poisoned rows that were flagged, of all poisoned rows.
        precision: Flagged rows that are poisoned, of all flagged rows.
        average_precision: Area under the precision-recall curve of the suspicion.
    """

    rows: str
    tpr: Rate
    precision: Rate
    average_precision: float


class IncidentQuality(Part):
    """Affected inputs that implicate the same rows, as the detector judged them.

    Attributes:
        affected: Ids of the affected inputs; none if it is the label as a whole that is judged.
        label: The label they were given.
        p_value: Share of clean inputs whose rows cohere as much, by the same procedure; None of a
            label as a whole.
        num_controls: Those clean inputs; 0 if a label was not looked at as a whole.
        num_flagged: Rows that were flagged.
        false_discovery_rate: Share of false flags that was promised.
        precision: Precision of the flags that controls let expect: on average, and the ends of
            a 95 % interval; None without flags.
        p_value_left: P-value of what is found once those rows are taken out; None without flags,
            or if hardly a row is left.
        enrichment: How many times as frequent every label is among the rows of all labels that
            cohere most with the affected inputs as among all rows, the most frequent first.
        rival: The label that is enriched most, of those that surely are more than the given one;
            None without any, or if all rows were looked among anyway.
        untold: Whether there is more than chance explains, yet no row of it stands out.
        alike: Ids of clean inputs that cohere with the rows as these do with each other, and were
            therefore not compared with: the attack may have reached them, too.
    """

    affected: list[str]
    label: str
    p_value: float | None
    num_controls: int
    num_flagged: int
    false_discovery_rate: float
    precision: tuple[float, float, float] | None
    p_value_left: float | None = None
    enrichment: dict[str, float] = {}
    rival: str | None = None
    untold: bool = False
    alike: list[str] = []


class BlockQuality(Part):
    """Rows that cohere as nothing else in their class does, as a scan of all rows found them.

    Attributes:
        label: The label they carry.
        num_rows: How many they are.
        coherence: Median of their cosines with each other.
        clean_coherence: Largest median cosine of a clean input of that label with them, but for
            those in `alike`.
        agreement: Share to which a model that never saw them gives their label.
        usual_agreement: The same of other rows with that label; None if none was held out.
        said: The label that it gives to most of them.
        p_value: Chance of so little agreement, were they rows like those others.
        suspected: Whether they seem to be planted.
        lacking: Whether clean inputs lack what they have in common.
        unclear: Whether they are not suspected, though surely less is agreed with than usually.
        alike: See `IncidentQuality`.
        planted: Those that were, by the truth.
        removed: Those that were flagged and removed.
    """

    label: str
    num_rows: int
    coherence: float
    clean_coherence: float
    agreement: float
    usual_agreement: float | None
    said: str
    p_value: float
    suspected: bool
    planted: Rate
    removed: Rate
    lacking: bool = False
    unclear: bool = False
    alike: list[str] = []

    @property
    def is_open(self) -> bool:
        """Whether it is suspected or unclear, and less than nine tenths of it were flagged."""
        return (self.suspected or self.unclear) and (self.removed.value or 0.0) < REMOVED


class CurvePoint(Part):
    """Mean probability of the wrong labels once some rows are unlearnt.

    Attributes:
        rows: How many.
        flagged: If they are the most suspicious ones.
        others: If they are unflagged ones with the same labels; None if there are too few.
    """

    rows: int
    flagged: float
    others: float | None


class ConfirmationCurve(Part):
    """Whether the wrong predictions die with the flagged rows, and only with them.

    Attributes:
        before: Mean probability of the wrong labels.
        points: By number of rows.
        cut: Fewest rows from which on the wrong predictions are dead; None if they survive.
        spoilt: Whether the fewest other rows ended them as well, so that nothing is told.
    """

    before: float
    points: list[CurvePoint]
    cut: int | None
    spoilt: bool = False


class Affected(Part):
    """An affected input: its id, the label the suspect model gave, its true class if known."""

    id: str
    predicted: str
    true: str | None


class Evidence(Part):
    """A sealed artefact: where it lies and the sha256 of its manifest or file."""

    path: str
    sha256: str
    inputs: dict[str, str] = {}


class AuditReport(Part):
    """Everything the audit measured, with the digest of everything it measured it on.

    Attributes:
        version: Format version.
        before: The suspect model.
        after: The remediated model.
        detection: Flags against truth, for all rows and for the rows with the predicted
            label.
        published: The published rule (Delta-Influence) against truth, for all rows and for the
            rows with the predicted label.
        detector_verdict: ``poison found``, ``poison suspected``, ``not measured`` or ``nothing
            found``.
        incidents: What the affected inputs implicate, if the detector judges them.
        num_train: Training rows.
        num_flagged: Rows removed.
        emptied_classes: Classes all of whose rows were removed.
        affected: The inputs the investigation started from.
        curvature: What the influence functions were fitted on: tier, parameters, rows.
        methods: The settings of every method that took part, by params section.
        gradient_samples: Per-sample gradients spent, by ``train`` and ``remediate``.
        success: PSR after below `psr_bound` and accuracy drop within `accuracy_drop_bound`.
        psr_bound: Bound that PSR must stay below.
        accuracy_drop_bound: Largest accepted drop of clean accuracy.
        confirmation: What unlearning flagged rows does to the wrong predictions, if that was tried.
        blocks: What a scan of all rows found; None without a scan.
        unchecked: Classes that the scan could not look at.
        in_part: Classes that the scan could not look at as a whole.
        artifacts: Digest of every artefact, by name.
    """

    version: int = 1
    before: ModelQuality
    after: ModelQuality
    detection: list[DetectionQuality]
    published: list[DetectionQuality]
    detector_verdict: str
    incidents: list[IncidentQuality]
    num_train: int
    num_flagged: int
    emptied_classes: list[str]
    affected: list[Affected]
    curvature: str
    methods: dict[str, Any]
    gradient_samples: dict[str, int]
    success: bool
    psr_bound: float
    accuracy_drop_bound: float
    confirmation: ConfirmationCurve | None = None
    blocks: list[BlockQuality] | None = None
    unchecked: list[str] = []
    in_part: list[str] = []
    artifacts: dict[str, Evidence]

    @property
    def open_blocks(self) -> int | None:
        """Suspected or unclear blocks still trained on; None without a scan of every class."""
        if self.blocks is None or self.unchecked:
            return None
        return sum(block.is_open for block in self.blocks)

    @property
    def partly_scanned(self) -> int | None:
        """Classes that no scan looked at as a whole; None without a scan."""
        return None if self.blocks is None else len(self.unchecked) + len(self.in_part)

    @property
    def accuracy_drop(self) -> float | None:
        """Clean accuracy before minus after; None if it was not measured."""
        return drop(self.before.clean_accuracy, self.after.clean_accuracy)


def drop(before: Rate, after: Rate) -> float | None:
    """Subtract a rate from an earlier one, rounded once, so that bounds on it are inclusive."""
    if before.value is None or after.value is None:
        return None
    parts = (Fraction(rate.successes, rate.total) for rate in (before, after))
    return float(next(parts) - next(parts))


def headline(report: AuditReport) -> dict[str, Any]:
    """Pick the figures that ``dvc metrics diff`` compares."""
    figures: dict[str, Any] = {"success": report.success, "accuracy_drop": report.accuracy_drop}
    for moment, quality in (("before", report.before), ("after", report.after)):
        figures[moment] = {
            name: getattr(quality, name).value for name in type(quality).model_fields
        }
    for rule, entries in (("detection", report.detection), ("published", report.published)):
        figures[rule] = {
            entry.rows: {
                "tpr": entry.tpr.value,
                "precision": entry.precision.value,
                "average_precision": entry.average_precision,
            }
            for entry in entries
        }
    return figures


def summary(report: AuditReport) -> str:
    """Say in one line what the audit found."""
    before, after = report.before, report.after
    text = (
        f"poison success {before.psr} before, {after.psr} after; "
        f"clean accuracy {before.clean_accuracy} before, {after.clean_accuracy} after"
    )
    gone = ", ".join(report.emptied_classes)
    return f"{text}; no row is left of class {gone}" if gone else text


def read_report(path: Path) -> AuditReport:
    """Read an audit report.

    Raises:
        EvidenceError: The file is missing or is not an audit report.
    """
    if not path.is_file():
        raise EvidenceError(f"expected an audit report at {path}, found none; run: dvc repro audit")
    try:
        return AuditReport.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise EvidenceError(
            f"{path} is not an audit report ({reason}); run: dvc repro audit"
        ) from error
