"""Rows whose influence, normalised on both sides, coheres with an incident; calibrated."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from defense.detectors.candidates import RowDetector, narrowed
from defense.detectors.coherence import Reals
from defense.detectors.controls import Controls, Finding
from defense.detectors.search import CleanInputs, Coherence, Search, Sighting, starts_of
from defense.detectors.subpopulation import subpopulation
from defense.errors import DataError
from defense.evidence import Incident
from defense.records import Case, Flags, Mask

logger = logging.getLogger(__name__)


class NormalisedInfluence(RowDetector, Coherence):
    """Flag the rows that form a block with the affected inputs.

    Influence is measured between gradients of margins and divided by the norms of both sides,
    so that neither badly fitted rows nor perfectly fitted ones are favoured. The rows that
    cohere most with an incident become queries themselves until they stay the same. How clean
    inputs cohere with these says which rows stand out; put through the same procedure, clean
    inputs say whether anything was found at all. What was found is taken out, and what is left
    is looked at again. At last the class as a whole is looked at, for rows that have something in
    common that its clean inputs lack: poison with correct labels need not cohere with the
    affected input.

    Attributes:
        affected: Use only the first so many affected inputs; None uses all.
    """

    name: Literal["normalised_influence"] = "normalised_influence"
    rows: Literal["all", "predicted_label"] = "predicted_label"
    affected: int | None = Field(None, gt=0)

    def detect(self, case: Case, generator: torch.Generator, scratch: Path | None = None) -> Flags:
        """See `Detector.detect`.

        Raises:
            DataError: The case has no directions, or for no affected input enough controls for an
                alarm and two rows to compare it with.
        """
        directions, controls = case.directions, case.controls
        if directions is None or controls is None:
            raise DataError(
                "detector normalised_influence expected the directions of the rows and clean "
                "controls, got none; run: dvc repro directions"
            )
        case = narrowed(case, self.affected)
        clean = CleanInputs(controls, generator)
        search = Search(self, case.train, directions, clean, everywhere=self.rows == "all")
        found, incidents = Evidence.of(len(case.train)), list[Incident]()
        labels, refused = np.unique(_labels(case)).tolist(), list[DataError]()
        for label in labels:
            try:
                incidents += _looked_at(search, case, label, found)
            except DataError as error:
                logger.warning("not investigated: %s", error)
                refused.append(error)
                incidents.append(_unmeasured(self, case, label))
            search.forget(label)
        if len(refused) == len(labels):
            raise refused[0]
        lowest = np.minimum(np.nanmin(found.suspicion), 0)  # of rows that nothing was asked about
        suspicion = np.where(np.isnan(found.suspicion), lowest, found.suspicion)
        flags = self.flags(case, suspicion, 0.0)
        p_values = np.where(flags.mask, found.p_values, np.nan)
        return replace(flags, incidents=tuple(incidents), p_values=p_values)


@dataclass
class Evidence:
    """What speaks against each row; NaN where nothing was asked.

    Attributes:
        suspicion: How far a row is above the threshold, ``[n]``.
        p_values: Of flagged rows, the chance that a clean input coheres as much, ``[n]``.
    """

    suspicion: Reals
    p_values: NDArray[np.float64]

    @classmethod
    def of(cls, count: int) -> "Evidence":
        """Begin with none."""
        return cls(np.full(count, np.nan, np.float32), np.full(count, np.nan))

    def add(self, other: "Evidence") -> None:
        """Keep what speaks most against each row."""
        self.suspicion = np.fmax(self.suspicion, other.suspicion)
        self.p_values = np.fmin(self.p_values, other.p_values)

    def take(
        self, places: NDArray[np.int64], above: Reals, finding: Finding, flagged: Mask
    ) -> None:
        """Add what was found at some rows.

        Args:
            places: Their numbers, ``[m]``.
            above: How far each is above the threshold, ``[m]``.
            finding: What was found among them.
            flagged: Which of them are flagged, ``[m]``.
        """
        self.suspicion[places] = np.fmax(self.suspicion[places], above)
        self.p_values[places[flagged]] = finding.p_values[flagged]


def _labels(case: Case) -> NDArray[np.int64]:
    """Labels of the affected inputs, in the order of their numbers."""
    labels: NDArray[np.int64] = case.queries.labels.numpy()[case.queries.changed("none")]
    return labels


def _looked_at(search: Search, case: Case, label: int, found: Evidence) -> list[Incident]:
    """List the incidents of a label, the class as a whole last; adds to what was found."""
    judged = [*_incidents(search, case, label)]  # all of them, or none
    for _, evidence in judged:
        found.add(evidence)
    incident, evidence = _of_class(search, label, found.suspicion > 0)
    found.add(evidence)
    return [*(incident for incident, _ in judged), incident]


def _unmeasured(settings: Coherence, case: Case, label: int) -> Incident:
    """Write down that affected inputs of a label could not be judged."""
    return Incident(
        affected=tuple(np.flatnonzero(_labels(case) == label).tolist()),
        label=label,
        p_value=None,
        num_controls=0,
        num_flagged=0,
        false_discovery_rate=settings.false_discovery_rate,
        expected_false=(0.0, 0.0, 0.0),
    )


def _incidents(search: Search, case: Case, label: int) -> Iterator[tuple[Incident, Evidence]]:
    """Yield the incidents of a label, and what each says against rows."""
    bench, numbers = search.bench(label), np.flatnonzero(_labels(case) == label)
    original = np.flatnonzero(case.queries.changed("none"))[numbers]
    images = case.queries.images[torch.from_numpy(original)]
    starts = starts_of(bench.rows, images, label)
    for group in together([search.certain(label, start) for start in starts], bench.null):
        seen = [*search.sightings(label, starts[group].mean(0))]
        evidence = Evidence.of(len(case.train))
        for sighting in seen:
            finding, found = sighting.finding, sighting.found(search.settings.alarm)
            places = bench.rows.places[sighting.among]
            evidence.take(places, _above(finding, found=found), finding, finding.flagged & found)
        affected = tuple(int(number) for number in numbers[group])
        incident = _incident(search, affected, label, seen)
        pointed = search.pointed(images[group], label)
        rival = None if search.everywhere else pointed.rival(label, search.settings.alarm)
        enrichment = tuple(pointed.enrichment.tolist())
        if rival is not None:
            _warn(enrichment, label, rival, case.train.class_names)
        yield replace(incident, enrichment=enrichment, rival=rival), evidence


def _of_class(search: Search, label: int, explained: Mask) -> tuple[Incident, Evidence]:
    """Tell what rows of a label have in common that its clean inputs lack.

    Which inputs are affected does not matter to it.
    """
    seen, settings = subpopulation(search, label, explained), search.settings
    incident = Incident(
        affected=(),
        label=label,
        p_value=None,
        num_controls=0 if seen is None else len(seen.finding.null),
        num_flagged=0 if seen is None else len(seen.rows),
        false_discovery_rate=settings.false_discovery_rate,
        expected_false=(0.0, 0.0, 0.0),
    )
    evidence = Evidence.of(len(explained))
    if seen is None or not len(seen.rows):
        return incident, evidence
    above = seen.finding.block.scores - seen.finding.threshold
    evidence.take(seen.places, above, seen.finding, seen.finding.flagged)
    return replace(incident, expected_false=seen.finding.expected_false), evidence


def _warn(enrichment: tuple[float, ...], label: int, rival: int, names: Sequence[str]) -> None:
    """Warn that rows with another label cohere most with the affected inputs."""
    logger.warning(
        "rows labelled %s are %.1f times as frequent among those that cohere most with the "
        "affected inputs as among all, rows labelled %s, the predicted label, %.1f times; to "
        "look among all rows set detector.rows to all",
        names[rival],
        enrichment[rival],
        names[label],
        enrichment[label],
    )


def _above(finding: Finding, *, found: bool) -> Reals:
    """Tell how far rows are above the threshold; none is, if chance explains what was found."""
    above = finding.block.scores - (finding.threshold if found else finding.block.scores.max())
    within = np.maximum(above, np.finfo(np.float32).tiny)
    result: Reals = np.where(finding.flagged & found, within, np.minimum(above, 0))
    return result


def _incident(
    search: Search, affected: tuple[int, ...], label: int, seen: list[Sighting]
) -> Incident:
    """Sum up what was found for some affected inputs, one block after the other."""
    first, settings = seen[0], search.settings
    found = [sighting.finding for sighting in seen if sighting.found(settings.alarm)]
    parts = found or [first.finding]
    mean, low, high = np.sum([finding.expected_false for finding in parts], axis=0).tolist()
    return Incident(
        affected=affected,
        label=label,
        p_value=first.p_value,
        num_controls=len(search.strengths(search.bench(label), label, first.finding)),
        num_flagged=int(sum(finding.flagged.sum() for finding in found)),
        false_discovery_rate=settings.false_discovery_rate,
        expected_false=(mean, low, high),
        p_value_left=seen[-1].p_value if found and not seen[-1].found(settings.alarm) else None,
        untold=seen[-1].hidden(settings.alarm),
        alike=tuple(sorted({name for part in parts for name in search.alike(label, part)})),
    )


def together(findings: list[Finding], null: Controls) -> list[list[int]]:
    """Group affected inputs of one incident: lists of their places.

    One that leads to no rows by itself joins the incident that it coheres with most, and never
    makes two of them one; those that join none may form one among themselves.
    """
    lead = [place for place, finding in enumerate(findings) if finding.flagged.any()]
    groups = _joined(lead, findings, null)
    lost = []
    for place in sorted(set(range(len(findings))) - set(lead)):
        finding = findings[place]
        reach = {
            number: null.reach(finding, findings[number])
            for number in lead
            if null.are_of_one_incident(finding, findings[number])
        }
        if reach:
            next(group for group in groups if max(reach, key=lambda n: reach[n]) in group).append(
                place
            )
        else:
            lost.append(place)
    return sorted(sorted(group) for group in groups + _joined(lost, findings, null))


def _joined(places: list[int], findings: list[Finding], null: Controls) -> list[list[int]]:
    """Group findings, each of which is of one incident with another one of its group."""
    groups: list[list[int]] = []
    for place in places:
        joined = [
            group
            for group in groups
            if any(null.are_of_one_incident(findings[place], findings[other]) for other in group)
        ]
        groups = [group for group in groups if group not in joined]
        groups.append([place, *itertools.chain(*joined)])
    return groups
