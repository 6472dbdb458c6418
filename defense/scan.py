"""Is a model poisoned, and by which rows, without an incident to start from.

Poisons of one attack cohere with each other as nothing else in their class does. A scan looks for
such blocks, in the training set alone or where inputs point to, and asks a model that never saw
the rows of a block whether it would give them their label: natural blocks, such as pictures of
one car, carry the label that others teach, too; planted ones do not. Poison with correct labels
passes that test; it is sought as rows of a class that have in common what its clean inputs lack.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.stats import false_discovery_control, fisher_exact

from defense.compute import progress
from defense.contracts import Architecture
from defense.detectors.coherence import Block, Reals, leading, medians
from defense.detectors.controls import Finding, exceedance
from defense.detectors.search import FEWEST, Bench, CleanInputs, Coherence, Search, starts_of
from defense.detectors.subpopulation import Subpopulation, subpopulation
from defense.errors import DataError
from defense.evidence import Directions, FoundBlock, PointedInput, Scan
from defense.prediction import predict
from defense.recipe import Recipe
from defense.records import ImageSet, Mask, mask_of
from defense.victim import make_trainer

logger = logging.getLogger(__name__)

Predictor = Callable[[ImageSet], NDArray[np.int64]]
Independent = Callable[[ImageSet, int], Predictor]  # trains on some rows for some epochs

CHUNK = 256  # rows whose cosines with their class are looked at together
TRIES = 10  # places looked at per attempt, as long as they lead to a known block
LISTED = 20  # inputs per block that are told, more only if it dictates more
MOSTLY = 0.5  # share of rows from which on they are taken for the same
CONTRADICTED = 0.5  # share of the usual agreement up to which labels are contradicted


class ScanSettings(Coherence):
    """How a scan looks for blocks and judges them.

    Attributes:
        num_controls: See `Coherence`; fewer, because there is one such class after the other.
        attempts: Places per class where a block is sought.
        candidates: Rows of a class, at random, that may be such a place.
        smallest: Rows of a block at least; fewer are not judged.
        epochs: That the independent model is trained for.
        max_epochs: The same, if it knows too little.
        max_rows: Rows that it is trained on, at random; null for all that are left.
        held_out: Rows per class that it never sees, for comparison with those of a block.
    """

    num_controls: int = Field(500, gt=0)
    attempts: int = Field(3, gt=0)
    candidates: int = Field(4096, gt=0)
    smallest: int = Field(16, gt=1)
    epochs: int = Field(1, gt=0)
    max_epochs: int = Field(16, gt=0)
    max_rows: int | None = Field(10_000, gt=0)
    held_out: int = Field(100, gt=9)


@dataclass(frozen=True)
class Suspicion:
    """A block that coheres more than clean inputs do, not judged yet.

    Attributes:
        label: The label of its rows.
        rows: Their numbers in the training set, ascending.
        finding: How much they cohere.
        clean: Largest median cosine of a clean input with it.
        lacking: See `defense.evidence.FoundBlock`.
    """

    label: int
    rows: NDArray[np.int64]
    finding: Finding
    clean: float
    lacking: bool = False


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
        self.search, self.independent = Search(settings, train, directions, clean), independent

    def rows(self, seed: int) -> Scan:
        """Look for blocks in the training set alone."""
        checked, unchecked = self._sorted(range(self.train.num_classes))
        labels = progress(iterable=checked, desc="classes", unit="class")
        blocks = [
            block for label in labels for block in self._blocks(label, self._dense(label, seed))
        ]
        blocks, in_part = self._with_right_labels(checked, blocks)
        return Scan(self._judged(blocks, seed), (), self.settings.alarm, unchecked, in_part)

    def inputs(self, images: ImageSet, predicted: NDArray[np.int64], seed: int) -> Scan:
        """Look for blocks, also where inputs point to, and for inputs that blocks dictate.

        Args:
            images: The inputs; their labels are not used.
            predicted: What the model makes of them, int64 ``[q]``.
            seed: Of the rows the independent model is compared on.
        """
        blocks, starts = list[Suspicion](), dict[int, Reals]()
        checked, unchecked = self._sorted(np.unique(predicted).tolist())
        for label in progress(iterable=checked, desc="classes", unit="class"):
            bench = self.search.bench(label)
            own = images.images(np.flatnonzero(predicted == label))
            starts[label] = starts_of(bench.rows, own, label)
            pointing = self._pointing(bench, starts[label])
            blocks += self._blocks(label, pointing, self._dense(label, seed))
        every, in_part = self._with_right_labels(checked, blocks)
        judged = self._judged(every, seed)
        pointed = list[PointedInput]()
        for number, block in enumerate(blocks):  # no input need point to those that were added
            places = np.flatnonzero(predicted == block.label)
            chances = self._dictated(block, starts[block.label])
            dictated = chances <= self.settings.false_discovery_rate
            order = np.argsort(chances, kind="stable")[: max(LISTED, dictated.sum())]
            pointed += [
                PointedInput(str(images.ids[place]), int(place), number, float(p_value), bool(sure))
                for place, p_value, sure in zip(
                    *(column[order] for column in (places, chances, dictated)), strict=True
                )
            ]
        return Scan(judged, tuple(pointed), self.settings.alarm, unchecked, in_part)

    def _sorted(self, labels: Iterable[int]) -> tuple[list[int], tuple[int, ...]]:
        """Tell labels that can be looked at from those with too few rows or clean inputs."""
        checked, unchecked = list[int](), list[int]()
        fewest = max(self.settings.smallest, FEWEST)
        for label in labels:
            try:
                if (count := len(self.search.bench(label).rows)) < fewest:
                    name = self.train.class_names[label]
                    raise DataError(f"expected {fewest} or more rows of {name}, got {count}")
            except DataError as error:
                logger.warning("not scanned: %s", error)
                unchecked.append(label)
            else:
                checked.append(label)
        return checked, tuple(unchecked)

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
        """Grow blocks from some places of every kind, as long as their seeds are new."""
        bench, known = self.search.bench(label), set[int]()
        for block in itertools.chain(*(self._grown(bench, starts, known) for starts in kinds)):
            finding = bench.null.judge(bench.rows, block, self.settings.rounds)
            members = np.flatnonzero(finding.flagged)
            known |= {*block.seeds.tolist(), *members.tolist()}
            if len(members) >= self.settings.smallest:
                clean = float(bench.null.null(finding.block).max())
                yield Suspicion(label, bench.rows.places[members], finding, clean)

    def _grown(self, bench: Bench, starts: Iterator[Reals], known: set[int]) -> Iterator[Block]:
        """Yield what grows at places away from known rows; known seeds are no attempt."""
        # An attack is as dense at all of its rows, so that it would hide another one.
        size = min(self.settings.seeds, len(bench.rows))

        def is_new(rows: NDArray[np.int64]) -> bool:
            return len(known & {*rows.tolist()}) <= len(rows) / 2

        elsewhere = (start for start in starts if is_new(leading(start, size)))
        grown = map(bench.grow, itertools.islice(elsewhere, TRIES * self.settings.attempts))
        return itertools.islice((b for b in grown if is_new(b.seeds)), self.settings.attempts)

    def _with_right_labels(
        self, labels: list[int], blocks: list[Suspicion]
    ) -> tuple[list[Suspicion], tuple[int, ...]]:
        """Add what rows of a class have in common that clean inputs of it lack.

        If blocks hold most of these rows, the blocks themselves are what clean inputs lack.

        Returns:
            The blocks in their order, then those that were added; labels that are too small for it.
        """
        in_part = list[int]()
        for label in labels:
            seen = subpopulation(self.search, label, self._any([]))
            if seen is None:
                in_part.append(label)
            elif len(seen.rows):
                blocks = self._joined(label, seen, blocks)
        return blocks, tuple(in_part)

    def _joined(self, label: int, seen: Subpopulation, blocks: list[Suspicion]) -> list[Suspicion]:
        lacking = mask_of(seen.rows, len(self.train))
        within = [bool(lacking[block.rows].mean() > MOSTLY) for block in blocks]
        if self._any([*itertools.compress(blocks, within)])[seen.rows].mean() > MOSTLY:
            both = zip(blocks, within, strict=True)
            return [replace(block, lacking=same or block.lacking) for block, same in both]
        if len(seen.rows) < self.settings.smallest:
            return blocks
        clean = float(seen.null.null(seen.finding.block).max())
        return [*blocks, Suspicion(label, seen.rows, seen.finding, clean, lacking=True)]

    def _dictated(self, block: Suspicion, starts: Reals) -> NDArray[np.float64]:
        """Chance that a clean input coheres as much with a block, adjusted for their number."""
        settled, null = block.finding.block, self.search.bench(block.label).null
        own = medians(np.take(starts, settled.seeds, axis=1).T)
        chances = exceedance(null.null(settled), own)
        adjusted: NDArray[np.float64] = false_discovery_control(chances)
        return adjusted

    def _judged(self, blocks: list[Suspicion], seed: int) -> tuple[FoundBlock, ...]:
        """Ask a model that never saw the rows of any block, nor some others of their classes.

        If it knows too little of these others, it is trained anew for four times as long.
        """
        if not blocks:
            return ()
        labels, rng = self.train.labels, np.random.default_rng(seed)
        suspect = self._any(blocks)
        held = np.zeros_like(suspect)
        for label in sorted({block.label for block in blocks}):
            others = rng.permutation(np.flatnonzero((labels == label) & ~suspect))
            held[others[: min(self.settings.held_out, len(others) // 2)]] = True
        judged = np.unique(labels[held])
        seen = rng.permutation(np.flatnonzero(~(suspect | held)))[: self.settings.max_rows]
        if not len(seen):
            raise DataError("expected rows outside of blocks to train on, but all are in blocks")
        rows, epochs = self.train.take(np.sort(seen)), self.settings.epochs
        while True:
            said = np.full(len(labels), -1, dtype=np.int64)
            said[suspect | held] = self.independent(rows, epochs)(self.train.where(suspect | held))
            known = [(said == label)[held & (labels == label)].mean() for label in judged]
            if min(known, default=1.0) >= self.competent or epochs >= self.settings.max_epochs:
                break
            epochs = min(4 * epochs, self.settings.max_epochs)
        alarm = self.settings.alarm / len(blocks)
        return tuple(self._judge(block, said, held, alarm) for block in blocks)

    @property
    def competent(self) -> float:
        """Share of a class's rows that the independent model has to know.

        It is twice that of chance, or half-way between chance and all if that is less.
        """
        chance = 1 / self.train.num_classes
        return min(2 * chance, (1 + chance) / 2)

    def _any(self, blocks: list[Suspicion]) -> Mask:
        """Tell rows of some blocks from the others, bool ``[n]``."""
        rows = itertools.chain(*(block.rows for block in blocks))
        return mask_of(np.fromiter(rows, dtype=np.int64), len(self.train))

    def _judge(
        self, block: Suspicion, said: NDArray[np.int64], held: Mask, alarm: float
    ) -> FoundBlock:
        """Compare how often the independent model agrees with the labels of a block."""
        label, scores = block.label, block.finding.block.scores[block.finding.flagged]
        own, usual = said[block.rows] == label, said[held & (self.train.labels == label)] == label
        counts = [[group.sum(), (~group).sum()] for group in (own, usual)]
        p_value = float(fisher_exact(counts, alternative="less").pvalue)
        votes = np.bincount(said[block.rows], minlength=self.train.num_classes)
        agreement, base = float(own.mean()), float(usual.mean()) if len(usual) else 0.0
        return FoundBlock(
            label,
            self._any([block]),
            float(np.median(scores)),
            block.clean,
            block.finding.expected_false,
            agreement,
            base,
            len(usual),
            int(votes.argmax()),
            float(votes.max() / len(own)),
            p_value,
            (p_value <= alarm and agreement <= CONTRADICTED * base)
            or base < self.competent
            or block.lacking,
            block.lacking,
        )


def independent_of(
    architecture: Architecture, recipe: Recipe, seed: int, scratch: Path | None
) -> Independent:
    """Prepare to train models like the suspect one, but shortly, on some rows.

    Args:
        architecture: Of the suspect model.
        recipe: It was trained with.
        seed: The run's seed.
        scratch: Folder for checkpoints of an unfinished training.
    """

    def fitted(rows: ImageSet, epochs: int) -> Predictor:
        short = recipe.model_copy(update={"epochs": epochs})
        trainer = make_trainer(
            architecture, short, seed=seed, stream="independent", scratch=scratch
        )
        model = trainer.fit(rows).model
        return lambda images: predict(model, images, label="independent")

    return fitted
