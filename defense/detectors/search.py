"""Looks for a block among the rows of a label, and says how sure it is."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from defense.detectors.coherence import Block, Cohering, Reals, Rows
from defense.detectors.controls import Controls, Finding
from defense.detectors.pointing import Pointed
from defense.detectors.whitening import RowsWithout, Whitened
from defense.errors import DataError
from defense.evidence import Directions
from defense.method import Method
from defense.records import ImageSet, Mask

FEWEST = 20  # controls of a class, for a tail to be fitted; rows, to look among
REPLAYED = 200  # controls that go through the whole procedure themselves, for the verdict
SAMPLE = 2**13  # rows of all labels, to see which labels an input points to
LEADING = 0.01  # of them, those that cohere most with it
PASSES = 10  # blocks that are taken out one after the other, at most
BATCH = 1024  # inputs whose directions are in memory together


class Coherence(Method):
    """When rows form a block, and when it is more than chance.

    Attributes:
        false_discovery_rate: Share of false flags that is promised.
        alarm: P-value up to which the verdict is that poison was found, or, if no row stands out,
            that it is suspected.
        num_controls: Clean inputs of a class at most, for the tail of chance. Up to 200 go through
            the whole procedure; if they are fewer than that, or too few for a p-value as small as
            `alarm`, other classes lend theirs.
        contaminated: Share of the clean inputs of a class that may be triggered themselves: as
            many are not compared with, if they alone cohere with a block as its rows do.
        seeds: Rows that become queries.
        rounds: Times they do, at most.
        subpopulation: Share of a class from which on its rows are flagged if they have something
            in common that its clean inputs lack; null never looks for that.
    """

    false_discovery_rate: float = Field(0.05, gt=0, lt=1)
    alarm: float = Field(0.01, gt=0, lt=1)
    num_controls: int = Field(1000, ge=FEWEST)
    contaminated: float = Field(0.01, ge=0, le=0.1)
    seeds: int = Field(16, gt=1)
    rounds: int = Field(5, gt=0)
    subpopulation: float | None = Field(0.05, gt=0, le=1)


class CleanInputs:
    """Labelled images that are not among the training rows, in random order."""

    def __init__(self, images: ImageSet, generator: torch.Generator) -> None:
        """Take the images."""
        self.mixed = images.take(torch.randperm(len(images), generator=generator).numpy())
        self.counts = np.bincount(images.labels, minlength=images.num_classes)

    def of(self, label: int, count: int) -> ImageSet:
        """Return the first `count` images of a class, or fewer.

        Whether the model gets them right is not asked: among the training rows of the class
        there are those, too, that it would get wrong had it not seen them.
        """
        return self.mixed.take(np.flatnonzero(self.mixed.labels == label)[:count])


@dataclass(frozen=True)
class Bench:
    """The rows of a label, and clean inputs of it that say what chance can do among them."""

    settings: Coherence
    rows: Rows
    null: Controls

    def grow(self, start: Reals) -> Block:
        """Let a block grow from the cosines of an input with the rows, ``[n]``."""
        return self.rows.grow(start, self.settings.seeds, self.settings.rounds)

    def judge(self, start: Reals) -> Finding:
        """Grow a block and flag what stands out; see `Controls.judge`."""
        return self.null.judge(self.rows, self.grow(start), self.settings.rounds)

    def where(self, mask: Mask) -> "Bench":
        """Select some of the rows, bool ``[n]``."""
        return Bench(self.settings, self.rows.where(mask), self.null.where(mask))

    @cached_property
    def strengths(self) -> NDArray[np.float64]:
        """Strengths of clean inputs themselves, each put through the same procedure."""
        return np.array([self._replayed(number) for number in range(len(self.null))[:REPLAYED]])

    def _replayed(self, number: int) -> float:
        """Put a clean input through the procedure as if it were none; returns the strength."""
        start, metric = self.null.starts[number], self.rows.directions
        rows: Cohering = self.rows
        if isinstance(metric, Whitened):
            rows = RowsWithout(self.rows, metric, number)
        block = rows.grow(start, self.settings.seeds, self.settings.rounds)
        return self.null.judge(rows, block, self.settings.rounds, number).strength

    def relative(self, strength: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Express strengths in median deviations of clean inputs, to compare classes by.

        A strength adds up over rows, so that it is larger in larger classes.
        """
        middle = np.median(self.strengths)
        spread = np.median(np.abs(self.strengths - middle))
        result: NDArray[np.float64] = (strength - middle) / max(spread, np.finfo(np.float32).eps)
        return result


@dataclass(frozen=True)
class Sighting:
    """What was found at once.

    Attributes:
        finding: A block.
        p_value: Of the block.
        among: The rows of a bench it was sought among, by number.
        beyond: Whether as many blocks as are flagged at most were found before; this one only
            tells what is left.
    """

    finding: Finding
    p_value: float
    among: NDArray[np.int64]
    beyond: bool = False

    def found(self, alarm: float) -> bool:
        """Tell whether it is more than chance, and to be flagged."""
        return not self.beyond and self.p_value <= alarm and bool(self.finding.flagged.any())

    def hidden(self, alarm: float) -> bool:
        """Tell whether it is more than chance, yet no row stands out."""
        return self.p_value <= alarm and not self.finding.flagged.any()


class Search:
    """Looks among the rows of one label after the other."""

    def __init__(
        self,
        settings: Coherence,
        train: ImageSet,
        directions: Directions,
        clean: CleanInputs,
        *,
        everywhere: bool = False,
    ) -> None:
        """Prepare.

        Args:
            settings: When rows form a block.
            train: The training set.
            directions: Directions of its rows.
            clean: Inputs for controls.
            everywhere: Look among all rows, whatever their label.
        """
        self.settings, self.train, self.directions = settings, train, directions
        self.clean, self.everywhere = clean, everywhere
        self.benches: dict[int, Bench] = {}
        self.known: dict[int, Reals] = {}
        self.lent: dict[int, list[float]] = {}

    def bench(self, label: int) -> Bench:
        """Take the rows and controls of a label.

        Raises:
            DataError: Fewer than two rows, or too few controls to tell what chance can do.
        """
        if label not in self.benches:
            rows, clean = self._rows(label), self.controls(label)
            if self.everywhere:  # other labels do not scatter as clean inputs of this one do
                starts = rows.directions.towards(clean)
            else:
                seen = Whitened.by(rows.directions, clean)
                rows, starts = rows.seen(seen), seen.left_out()
            promised = self.settings.false_discovery_rate, self.settings.contaminated
            self.benches[label] = Bench(self.settings, rows, Controls(starts, *promised))
        return self.benches[label]

    def forget(self, label: int) -> None:
        """Free the memory that rows and controls of a label take; they are made anew if asked."""
        self.benches.pop(label, None)
        self.known.pop(label, None)

    def controls(self, label: int) -> Reals:
        """Return directions of clean inputs of a label: ``[q, k]``.

        Raises:
            DataError: There are too few.
        """
        if label not in self.known:
            images = self.clean.of(label, self.settings.num_controls).images()
            if len(images) < FEWEST:
                raise DataError(
                    f"expected {FEWEST} or more clean inputs of class "
                    f"{self.train.class_names[label]}, got {len(images)}; give a larger test set"
                )
            labels = torch.full((len(images),), label)
            self.known[label] = self.directions.vectors(images, labels)
        return self.known[label]

    def alike(self, label: int, finding: Finding) -> tuple[str, ...]:
        """Name the clean inputs of a label that cohere with a block as its rows do."""
        images = self.clean.of(label, self.settings.num_controls)
        return tuple(images.ids[finding.alike].tolist())

    def _rows(self, label: int) -> Rows:
        chosen = (self.train.labels == label) | self.everywhere
        if chosen.sum() < 2:
            raise DataError(
                f"expected two or more rows with the label {self.train.class_names[label]} to "
                f"compare with, got {chosen.sum()}; set rows to all to compare with every row"
            )
        return Rows(self.directions, np.flatnonzero(chosen))

    @cached_property
    def sample(self) -> Rows:
        """Rows of all labels, drawn at random."""
        order = np.random.default_rng(0).permutation(len(self.train))
        return Rows(self.directions, np.sort(order[:SAMPLE]))

    def pointed(self, images: Tensor, label: int) -> Pointed:
        """Tell which labels the rows carry that cohere most with some inputs.

        Args:
            images: ``[q, c, h, w]``.
            label: What the model makes of them.
        """
        cosines = starts_of(self.sample, images, label).mean(0)
        labels, count = self.train.labels[self.sample.places], self.train.num_classes
        leading = labels[cosines >= np.quantile(cosines, 1 - LEADING)]
        return Pointed(np.bincount(leading, minlength=count), np.bincount(labels, minlength=count))

    def strengths(self, bench: Bench, label: int, finding: Finding) -> NDArray[np.float64]:
        """Relative strengths of controls: of the label, and of others if they are too few.

        Args:
            bench: The rows and controls of the label.
            label: The label.
            finding: Controls that cohere with it as its rows do are left out.

        Raises:
            DataError: They are too few for an alarm.
        """
        fewest = math.ceil(1 / self.settings.alarm - 1e-9) - 1
        alike = finding.alike[finding.alike < len(bench.strengths)]
        found = [*bench.relative(np.delete(bench.strengths, alike))]
        # One that is as strong by chance is not to decide alone.
        wanted = max(fewest, REPLAYED - len(alike))
        for other in map(int, np.argsort(-self.clean.counts, kind="stable")):
            if len(found) >= wanted:
                break
            enough = (self.train.labels == other).sum() > 1
            lent = self.clean.of(other, self.settings.num_controls)
            if other != label and enough and len(lent) >= FEWEST:
                found += self._lent_by(other)
        if len(found) < fewest:
            raise DataError(
                f"an alarm at {self.settings.alarm:g} takes {fewest} clean inputs, up to "
                f"{REPLAYED} of each class, got {len(found)}; give a larger test set or raise it"
            )
        return np.array(found)

    def _lent_by(self, label: int) -> list[float]:
        """Relative strengths of the controls of a label; only they stay in memory."""
        if label not in self.lent:
            known, bench = label in self.benches, self.bench(label)
            self.lent[label] = bench.relative(bench.strengths).tolist()
            if not known:
                self.forget(label)
        return self.lent[label]

    def _p_value(self, bench: Bench, label: int, finding: Finding) -> float:
        """Share of controls that are as strong as a finding, itself counted in."""
        strengths = self.strengths(bench, label, finding)
        stronger = strengths >= bench.relative(finding.strength)
        return float((1 + stronger.sum()) / (1 + len(strengths)))

    def sightings(self, label: int, start: Reals) -> Iterator[Sighting]:
        """Look for a block, take it out and look again, until nothing is found.

        Args:
            label: Among whose rows.
            start: Cosine of an input with them, ``[n]``.

        Yields:
            The blocks, the last of which is one that chance explains, of which no row stands out
            or that is one too many, unless hardly a row is left.
        """
        bench, among = self.bench(label), np.arange(len(start))
        for number in range(PASSES + 1):
            finding = bench.judge(start[among])
            p_value = self._p_value(bench, label, finding)
            yield Sighting(finding, p_value, among, beyond=number == PASSES)
            left = ~finding.flagged
            if p_value > self.settings.alarm or left.all() or left.sum() < FEWEST:
                break
            bench, among = bench.where(left), among[left]

    def certain(self, label: int, start: Reals) -> Finding:
        """Look for a block once; what chance explains has no flags.

        Args:
            label: Among whose rows.
            start: Cosine of an input with them, ``[n]``.
        """
        first = next(self.sightings(label, start))
        flagged = first.finding.flagged & first.found(self.settings.alarm)
        return replace(first.finding, flagged=flagged)


def starts_of(rows: Rows, images: Tensor, label: int) -> Reals:
    """Cosines of inputs with rows, by the margin of a label: ``[q, n]``."""
    known = rows.directions
    parts = [
        known.towards(known.vectors(part, torch.full((len(part),), label)))
        for part in images.split(BATCH)
    ]
    return np.concatenate(parts)
