"""Rows whose influence, normalised on both sides, coheres with an incident; calibrated."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from defense.detectors.candidates import RowDetector, narrowed
from defense.detectors.coherence import Block, Controls, Reals, Rows
from defense.errors import DataError
from defense.evidence import Directions, Incident
from defense.prediction import predict
from defense.records import Case, Flags, ImageSet

FEWEST = 20  # controls of a class, for a tail to be fitted


class NormalisedInfluence(RowDetector):
    """Flag the rows that form a block with the affected inputs.

    Influence is measured between gradients of margins and divided by the norms of both sides,
    so that neither badly fitted rows nor perfectly fitted ones are favoured. The rows that
    cohere most with an incident become queries themselves until they stay the same. How clean
    inputs cohere with these says which rows stand out; put through the same procedure, clean
    inputs say whether anything was found at all.

    Attributes:
        affected: Use only the first so many affected inputs; None uses all.
        false_discovery_rate: Share of false flags that is promised.
        alarm: P-value up to which the verdict is that poison was found.
        num_controls: Clean inputs of the predicted class at most. If they are too few for a p-value
            as small as `alarm`, other classes lend theirs.
        seeds: Rows that become queries.
        rounds: Times they do, at most.
    """

    name: Literal["normalised_influence"] = "normalised_influence"
    rows: Literal["all", "predicted_label"] = "predicted_label"
    affected: int | None = Field(None, gt=0)
    false_discovery_rate: float = Field(0.02, gt=0, lt=1)
    alarm: float = Field(0.01, gt=0, lt=1)
    num_controls: int = Field(200, gt=0)
    seeds: int = Field(16, gt=1)
    rounds: int = Field(5, gt=0)

    def detect(self, case: Case, generator: torch.Generator, scratch: Path | None = None) -> Flags:
        """See `Detector.detect`.

        Raises:
            DataError: The case has no directions, too few controls that the model gets right for
                an alarm, or fewer than two rows to compare an affected input with.
        """
        directions, controls = case.directions, case.controls
        if directions is None or controls is None:
            raise DataError(
                "detector normalised_influence expected the directions of the rows and clean "
                "controls, got none; run: dvc repro directions"
            )
        case = narrowed(case, self.affected)
        suspicion, incidents = np.full(len(case.train), np.nan, np.float32), list[Incident]()
        search = _Search(self, case, directions, clean_inputs(case.model, controls, generator))
        for label in np.unique(_labels(case)):
            for incident, found in search.incidents(int(label)):
                incidents.append(incident)
                suspicion = np.fmax(suspicion, found)
        suspicion = np.where(np.isnan(suspicion), np.nanmin(suspicion), suspicion)
        return replace(self.flags(case, suspicion, 0.0), incidents=tuple(incidents))


def _labels(case: Case) -> NDArray[np.int64]:
    """Labels of the affected inputs, in the order of their numbers."""
    labels: NDArray[np.int64] = case.queries.labels.numpy()[case.queries.changed("none")]
    return labels


def clean_inputs(model: nn.Module, controls: ImageSet, generator: torch.Generator) -> ImageSet:
    """Return the controls that the model gets right, in random order."""
    mixed = controls.take(torch.randperm(len(controls), generator=generator).numpy())
    return mixed.where(predict(model, mixed, label="controls") == mixed.labels)


class _Search:
    """Looks for the incidents of a case, one predicted label after the other."""

    def __init__(
        self, rule: NormalisedInfluence, case: Case, directions: Directions, controls: ImageSet
    ) -> None:
        self.rule, self.case, self.directions, self.controls = rule, case, directions, controls

    def rows(self, label: int) -> Rows:
        """Take the rows a label is compared with."""
        chosen = (self.case.train.labels == label) | (self.rule.rows == "all")
        if chosen.sum() < 2:
            raise DataError(
                f"detector.rows is {self.rule.rows}, expected two or more rows with the label "
                f"{self.case.train.class_names[label]}, got {chosen.sum()}; set it to all"
            )
        return Rows(self.directions, np.flatnonzero(chosen))

    def starts(self, rows: Rows, images: Tensor, label: int) -> Reals:
        """Cosines of inputs with rows: ``[q, n]``."""
        return rows.directions.inputs(images, torch.full((len(images),), label))

    def grow(self, rows: Rows, start: Reals) -> Block:
        """Let a block grow from one input or several."""
        return rows.grow(start, self.rule.seeds, self.rule.rounds)

    def null(self, rows: Rows, label: int) -> Controls:
        """Take the controls of a label.

        Raises:
            DataError: They are too few to tell what chance can do.
        """
        own = np.flatnonzero(self.controls.labels == label)[: self.rule.num_controls]
        if len(own) < FEWEST:
            raise DataError(
                f"expected {FEWEST} or more clean inputs of class "
                f"{self.case.train.class_names[label]} that the model gets right, got {len(own)}; "
                "give a larger test set"
            )
        return Controls(
            self.starts(rows, self.controls.images(own), label), self.rule.false_discovery_rate
        )

    def strengths(self, rows: Rows, null: Controls, label: int) -> NDArray[np.float64]:
        """Strengths of controls: those of the label, and of others if they are too few."""
        found = self._own_strengths(rows, null)
        fewest = math.ceil(1 / self.rule.alarm - 1e-9) - 1
        counts = np.bincount(self.controls.labels, minlength=self.case.train.num_classes)
        for other in np.argsort(-counts, kind="stable"):
            if len(found) < fewest and other != label and counts[other] >= FEWEST:
                others = self.rows(int(other))
                found += self._own_strengths(others, self.null(others, int(other)))
        if len(found) < fewest:
            raise DataError(
                f"detector.alarm {self.rule.alarm:g} takes {fewest} clean inputs that the model "
                f"gets right, got {len(found)}; give a larger test set or raise it"
            )
        return np.array(found)

    def _own_strengths(self, rows: Rows, null: Controls) -> list[float]:
        blocks = [self.grow(rows, start) for start in null.starts]
        findings = [
            null.judge(rows, block, self.rule.rounds, number) for number, block in enumerate(blocks)
        ]
        return [finding.strength for finding in findings]

    def incidents(self, label: int) -> Iterator[tuple[Incident, Reals]]:
        """Yield the incidents of a label, and how far each puts a row above the threshold.

        NaN where a row was not compared with it.
        """
        rows, original = self.rows(label), self.case.queries.changed("none")
        numbers = np.flatnonzero(_labels(self.case) == label)
        images = self.case.queries.images[torch.from_numpy(original)][torch.from_numpy(numbers)]
        starts, null = self.starts(rows, images, label), self.null(rows, label)
        strengths = self.strengths(rows, null, label)
        for group in together([self.grow(rows, start) for start in starts], null):
            block = self.grow(rows, starts[group].mean(0))
            finding = null.judge(rows, block, self.rule.rounds)
            p_value = (1 + (strengths >= finding.strength).sum()) / (1 + len(strengths))
            found = p_value <= self.rule.alarm and finding.flagged.any()
            limit = finding.threshold if found else finding.scores.max()
            suspicion = np.full(len(self.case.train), np.nan, dtype=np.float32)
            suspicion[rows.places] = finding.scores - limit
            yield (
                Incident(
                    tuple(int(number) for number in numbers[group]),
                    label,
                    float(p_value),
                    len(strengths),
                    int(finding.flagged.sum()) if found else 0,
                    self.rule.false_discovery_rate,
                    finding.expected_false,
                ),
                suspicion,
            )


def together(blocks: list[Block], null: Controls) -> list[list[int]]:
    """Group affected inputs of one incident: lists of their places."""
    groups: list[list[int]] = []
    for place, block in enumerate(blocks):
        joined = [
            group
            for group in groups
            if any(null.are_of_one_incident(block, blocks[number]) for number in group)
        ]
        groups = [group for group in groups if group not in joined]
        groups.append(sorted([place, *itertools.chain(*joined)]))
    return sorted(groups)
