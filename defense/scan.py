"""Is a model poisoned, and by which rows, without an incident to start from.

Poisons of one attack cohere with each other as nothing else in their class does. A scan looks for
such blocks, in the training set alone or where inputs point to, and asks a model that never saw
the rows of a block whether it would give them their label: natural blocks, such as pictures of
one car, carry the label that others teach, too; planted ones do not. Poison with correct labels
passes that test; it is sought as rows of a class that have in common what its clean inputs lack.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.stats import false_discovery_control

from defense.compute import progress
from defense.detectors.coherence import Block, Reals, leading, medians
from defense.detectors.controls import exceedance
from defense.detectors.search import BATCH, FEWEST, Bench, CleanInputs, Search, starts_of
from defense.detectors.subpopulation import Subpopulation, subpopulation
from defense.errors import DataError
from defense.evidence import Directions, PointedInput, Scan
from defense.independent import Hearing, Independence, Independent, Suspicion, rows_of
from defense.records import ImageSet, mask_of

logger = logging.getLogger(__name__)

CHUNK = 256  # rows whose cosines with their class are looked at together
TRIES = 100  # places looked at per attempt, as long as they lead to a known block
LISTED = 20  # inputs per block that are told, more only if it dictates more
MOSTLY = 0.5  # share of rows from which on they are taken for the same


class ScanSettings(Independence):
    """How a scan looks for blocks and judges them.

    Attributes:
        num_controls: See `Coherence`; fewer, because there is one such class after the other.
        contaminated: See `Coherence`; none, because natural blocks are in the test set, too.
        attempts: Places per class at which nothing new is found until no more are looked at. Those
            that lead to a block do not count: somebody might plant harmless ones before another.
        candidates: Rows of a class, at random, that may be such a place.
        smallest: Rows of a block at least; fewer are not judged.
    """

    num_controls: int = Field(500, ge=FEWEST)
    contaminated: float = Field(0.0, ge=0, le=0.1)
    attempts: int = Field(3, gt=0)
    candidates: int = Field(4096, gt=0)
    smallest: int = Field(16, gt=1)


@dataclass
class Found:
    """What the classes that were looked at hold.

    Attributes:
        blocks: Rows that cohere.
        added: Other rows that have in common what clean inputs of their class lack.
        unchecked: Labels with too few rows or clean inputs to be looked at.
        in_part: Labels with too few to be looked at as a whole.
    """

    blocks: list[Suspicion] = field(default_factory=list)
    added: list[Suspicion] = field(default_factory=list)
    unchecked: list[int] = field(default_factory=list)
    in_part: list[int] = field(default_factory=list)


class Scanner:
    """Looks for blocks and judges them, for one model and its training set."""

    def __init__(
        self,
        settings: ScanSettings,
        train: ImageSet,
        directions: Directions,
        clean: CleanInputs,
        independent: Independent,
    ) -> None:
        """Prepare.

        Args:
            settings: How blocks are sought.
            train: The training set.
            directions: Directions of its rows.
            clean: Inputs for controls.
            independent: Trains a model on some rows for some epochs; returns its predictions.
        """
        self.settings, self.train = settings, train
        self.search = Search(settings, train, directions, clean)
        self.hearing = Hearing(settings, train, independent)

    def rows(self, seed: int) -> Scan:
        """Look for blocks in the training set alone."""
        found = Found()
        for label in self._classes(range(self.train.num_classes), found):
            self._look(label, found, self._dense(label, seed))
        return self._judged(found, (), seed)

    def inputs(self, images: ImageSet, predicted: NDArray[np.int64], seed: int) -> Scan:
        """Look for blocks, also where inputs point to, and for inputs that blocks dictate.

        Args:
            images: The inputs; their labels are not used.
            predicted: What the model makes of them, int64 ``[q]``.
            seed: Of the rows the independent model is compared on.
        """
        found, pointed = Found(), list[PointedInput]()
        for label in self._classes(np.unique(predicted).tolist(), found):
            bench, places = self.search.bench(label), np.flatnonzero(predicted == label)
            parts = np.split(places, range(BATCH, len(places), BATCH))
            starts = np.concatenate(
                [starts_of(bench.rows, images.images(part), label) for part in parts]
            )
            first = len(found.blocks)
            kinds = self._pointing(bench, starts), self._dense(label, seed)
            for number, block in enumerate(self._look(label, found, *kinds), first):
                pointed += self._pointed(block, number, starts, places, images)
        return self._judged(found, tuple(pointed), seed)

    def _judged(self, found: Found, pointed: tuple[PointedInput, ...], seed: int) -> Scan:
        judged = self.hearing.judged([*found.blocks, *found.added], seed)
        unlooked = tuple(found.unchecked), tuple(found.in_part)
        return Scan(judged, pointed, self.settings.alarm, *unlooked)

    def _classes(self, labels: Sequence[int], found: Found) -> Iterator[int]:
        """Yield the labels that can be looked at, and forget the rows of each after its turn."""
        for label in progress(iterable=labels, desc="classes", unit="class"):
            if self._has_enough(label):
                yield label
            else:
                found.unchecked.append(label)
            self.search.forget(label)

    def _has_enough(self, label: int) -> bool:
        """Tell whether a class has rows and clean inputs enough to be looked at."""
        fewest = max(self.settings.smallest, FEWEST)
        try:
            if (count := len(self.search.bench(label).rows)) < fewest:
                name = self.train.class_names[label]
                raise DataError(f"expected {fewest} or more rows of {name}, got {count}")
        except DataError as error:
            logger.warning("not scanned: %s", error)
            return False
        return True

    def _look(self, label: int, found: Found, *kinds: Iterator[Reals]) -> list[Suspicion]:
        """Look for blocks of a class from some places of every kind, and at it as a whole.

        If blocks hold most of what clean inputs lack, the blocks themselves are what they lack.

        Returns:
            The blocks, without what was added because clean inputs lack it.
        """
        blocks = [*self._blocks(label, *kinds)]
        seen = subpopulation(self.search, label, rows_of([], len(self.train)))
        if seen is None:
            found.in_part.append(label)
        elif len(seen.rows):
            both = self._joined(label, seen, blocks)
            found.added += both[len(blocks) :]
            blocks = both[: len(blocks)]
        found.blocks += blocks
        return blocks

    def _dense(self, label: int, seed: int) -> Iterator[Reals]:
        """Yield cosines of rows with their class, those first that cohere most.

        What counts is how much more rows cohere with a row than clean inputs do: in a class
        whose pictures are much alike, clean inputs cohere as well.
        """
        bench = self.search.bench(label)
        drawn = np.random.default_rng(seed).permutation(len(bench.rows))
        places = np.sort(drawn[: self.settings.candidates])
        kept = min(self.settings.seeds, len(bench.rows) - 1)
        excess = np.empty(len(places), dtype=np.float32)
        for first in range(0, len(places), CHUNK):
            part = places[first : first + CHUNK]
            cosines = np.nan_to_num(bench.rows.between(part), nan=-1.0)
            others = np.partition(cosines, -kept, axis=1)[:, -kept]
            excess[first : first + CHUNK] = others - bench.null.starts[:, part].max(0)
        for place in places[np.argsort(-excess, kind="stable")]:
            start = bench.rows.between(np.array([place]))[0]
            start[place] = 1
            yield start

    def _pointing(self, bench: Bench, starts: Reals) -> Iterator[Reals]:
        """Yield cosines of inputs with a class, those first that cohere most with some rows."""
        kept = min(self.settings.seeds, starts.shape[1])
        standard = bench.null.standardised(starts)
        depth = np.partition(standard, -kept, axis=1)[:, -kept]
        yield from starts[np.argsort(-depth, kind="stable")]

    def _blocks(self, label: int, *kinds: Iterator[Reals]) -> Iterator[Suspicion]:
        """Grow blocks from some places of every kind, until too many led to nothing new."""
        bench, known, told = self.search.bench(label), set[int](), set[int]()
        for starts in kinds:
            left = self.settings.attempts
            for block in self._grown(bench, starts, known):
                finding = bench.null.judge(bench.rows, block, self.settings.rounds)
                members = np.flatnonzero(finding.flagged)
                known |= {*block.seeds.tolist(), *members.tolist()}
                again = len(told & {*members.tolist()}) > MOSTLY * len(members)
                if len(members) >= self.settings.smallest and not again:
                    told |= {*members.tolist()}
                    alike = self.search.alike(label, finding)
                    yield Suspicion(label, bench.rows.places[members], finding, alike=alike)
                else:
                    left -= 1
                if not left:
                    break

    def _grown(self, bench: Bench, starts: Iterator[Reals], known: set[int]) -> Iterator[Block]:
        """Yield what grows at places away from known rows, until too many lead back to them."""
        # An attack is as dense at all of its rows, so that it would hide another one.
        size, left = min(self.settings.seeds, len(bench.rows)), TRIES * self.settings.attempts

        def is_new(rows: NDArray[np.int64]) -> bool:
            return len(known & {*rows.tolist()}) <= len(rows) / 2

        for start in starts:
            if not is_new(leading(start, size)):
                continue
            if is_new((block := bench.grow(start)).seeds):
                yield block
            elif (left := left - 1) == 0:
                return

    def _joined(self, label: int, seen: Subpopulation, blocks: list[Suspicion]) -> list[Suspicion]:
        lacking = mask_of(seen.rows, len(self.train))
        within = [bool(lacking[block.rows].mean() > MOSTLY) for block in blocks]
        joined = rows_of([*itertools.compress(blocks, within)], len(self.train))
        if joined[seen.rows].mean() > MOSTLY:
            both = zip(blocks, within, strict=True)
            return [replace(block, lacking=same or block.lacking) for block, same in both]
        if len(seen.rows) < self.settings.smallest:
            return blocks
        return [*blocks, Suspicion(label, seen.rows, seen.finding, lacking=True)]

    def _pointed(
        self,
        block: Suspicion,
        number: int,
        starts: Reals,
        places: NDArray[np.int64],
        images: ImageSet,
    ) -> Iterator[PointedInput]:
        """Yield the inputs that a block dictates, or those that cohere most with it.

        Args:
            block: The block.
            number: Which one it is.
            starts: Cosines of the inputs with the rows of its class, ``[q, n]``.
            places: Numbers of the inputs, ``[q]``.
            images: All inputs.
        """
        finding = block.finding
        own = medians(np.take(starts, finding.block.seeds, axis=1).T)
        chances = false_discovery_control(exceedance(finding.null, own))
        dictated = chances <= self.settings.false_discovery_rate
        for one in np.argsort(chances, kind="stable")[: max(LISTED, dictated.sum())]:
            place = int(places[one])
            name, p_value = str(images.ids[place]), float(chances[one])
            yield PointedInput(name, place, number, p_value, bool(dictated[one]))
