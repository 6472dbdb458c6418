"""Whether other rows teach the label of a block: a model that never saw the block is asked.

Natural blocks, such as pictures of one car, carry the label that others teach, too; planted ones
do not.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.stats import fisher_exact

from defense.contracts import Architecture
from defense.detectors.controls import Finding
from defense.detectors.search import Coherence
from defense.errors import DataError
from defense.evidence import FoundBlock
from defense.prediction import predict
from defense.recipe import Recipe
from defense.records import ImageSet, Mask, mask_of
from defense.victim import make_trainer

Predictor = Callable[[ImageSet], NDArray[np.int64]]
Independent = Callable[[ImageSet, int], Predictor]  # trains on some rows for some epochs

CONTRADICTED = 0.5  # share of the usual agreement up to which labels are contradicted


class Independence(Coherence):
    """How the independent model is made, and what it is asked.

    Attributes:
        epochs: That the independent model is trained for at first.
        max_epochs: The same at most, if it knows too little. It takes more rows, if there are,
            instead of more epochs: so many times `max_rows`.
        max_rows: Rows that it is trained on at first, at random; null for all that are left. Rows
            of a class it is asked about are repeated up to an even share if they are less than
            half of one.
        held_out: Rows per class that it never sees, for comparison with those of a block.
    """

    epochs: int = Field(1, gt=0)
    max_epochs: int = Field(16, gt=0)
    max_rows: int | None = Field(10_000, gt=0)
    held_out: int = Field(100, gt=9)

    def efforts(self, available: int) -> Iterator[tuple[int, int]]:
        """Yield how many rows to learn from, for how many epochs: four times as much each time.

        Args:
            available: Rows there are.
        """
        first, effort = min(self.max_rows or available, available), self.epochs
        while True:
            rows = min(available, first * effort // self.epochs)
            yield rows, round(first * effort / rows)
            if effort >= self.max_epochs:
                return
            effort = min(4 * effort, self.max_epochs)


@dataclass(frozen=True)
class Suspicion:
    """A block that coheres more than clean inputs do, not judged yet.

    Attributes:
        label: The label of its rows.
        rows: Their numbers in the training set, ascending.
        finding: How much they cohere.
        lacking: See `defense.evidence.FoundBlock`.
        alike: See `defense.evidence.FoundBlock`.
    """

    label: int
    rows: NDArray[np.int64]
    finding: Finding
    lacking: bool = False
    alike: tuple[str, ...] = ()


def rows_of(blocks: Sequence[Suspicion], size: int) -> Mask:
    """Tell rows of some blocks from the others, bool ``[size]``."""
    return mask_of(np.concatenate([np.empty(0, np.int64), *(b.rows for b in blocks)]), size)


@dataclass(frozen=True)
class Agreement:
    """How often the independent model gives rows their label.

    Attributes:
        own: Whether it does, of every row of a block, bool ``[n]``.
        usual: The same of other rows with that label, bool ``[m]``.
        chance: Share of rows that guessing gives their label.
    """

    own: NDArray[np.bool_]
    usual: NDArray[np.bool_]
    chance: float

    @property
    def base(self) -> float:
        """Share of the other rows."""
        return float(self.usual.mean()) if len(self.usual) else 0.0

    @property
    def knows(self) -> bool:
        """Tell whether the model knows the class: twice as much of it as chance, or half-way."""
        return self.base >= min(2 * self.chance, (1 + self.chance) / 2)

    def p_value(self, agreeing: int) -> float:
        """Chance of so few rows that agree, were they like the others (Fisher's exact test)."""
        known = int(self.usual.sum())
        counts = [[agreeing, len(self.own) - agreeing], [known, len(self.usual) - known]]
        return float(fisher_exact(counts, alternative="less").pvalue)

    def telling(self, alarm: float) -> bool:
        """Tell whether labels that are all contradicted would be found out."""
        return self.knows and self.p_value(0) <= alarm

    def contradicted(self, alarm: float) -> bool:
        """Tell whether the labels are wrong, by the test or, if it can tell nothing, the share."""
        if not self.knows:
            return True
        wrong = self.own.mean() <= CONTRADICTED * self.base
        return bool(wrong) and (self.p_value(self.own.sum()) <= alarm or not self.telling(alarm))

    def unclear(self, alarm: float) -> bool:
        """Tell whether surely fewer labels are agreed with than usually.

        If they are not contradicted, most are agreed with all the same. So it is with natural rows
        that are harder than others, and with wrong labels among right ones, by which somebody
        might hide them.

        Args:
            alarm: For this block alone: somebody might add harmless ones, too.
        """
        return self.p_value(int(self.own.sum())) <= alarm


@dataclass(frozen=True)
class Hearing:
    """The training set, and the model that is asked about blocks of its rows."""

    settings: Independence
    train: ImageSet
    independent: Independent

    def judged(self, blocks: Sequence[Suspicion], seed: int) -> tuple[FoundBlock, ...]:
        """Ask a model that never saw the rows of any block, nor some others of their classes.

        As long as it knows too little for one of them to be found out it is trained anew, four
        times as much.

        Args:
            blocks: What to judge; if there are none, nothing is trained.
            seed: Of the rows that are held out and those that are learnt from.

        Raises:
            DataError: No row is outside of the blocks.
        """
        if not blocks:
            return ()
        rng = np.random.default_rng(seed)
        suspect = rows_of(blocks, len(self.train))
        held = self._held(blocks, suspect, rng)
        unseen, alarm = suspect | held, self.settings.alarm / len(blocks)
        order = rng.permutation(np.flatnonzero(~unseen))
        if not len(order):
            raise DataError("expected rows outside of blocks to train on, but all are in blocks")
        said = np.full(len(self.train), -1, dtype=np.int64)
        for rows, epochs in self.settings.efforts(len(order)):
            lessons = self._lessons(order[:rows], unseen, blocks, rng)
            said[unseen] = self.independent(lessons, epochs)(self.train.where(unseen))
            found = [self._agreement(block, said, held) for block in blocks]
            if all(one.telling(alarm) for one in found if len(one.usual)):
                break
        both = zip(blocks, found, strict=True)
        return tuple(self._judge(block, one, said, alarm) for block, one in both)

    def _held(self, blocks: Sequence[Suspicion], suspect: Mask, rng: np.random.Generator) -> Mask:
        """Draw other rows of the classes concerned, half of them at most, bool ``[n]``."""
        held = np.zeros_like(suspect)
        for label in sorted({block.label for block in blocks}):
            others = rng.permutation(np.flatnonzero((self.train.labels == label) & ~suspect))
            held[others[: min(self.settings.held_out, len(others) // 2)]] = True
        return held

    def _lessons(
        self,
        drawn: NDArray[np.int64],
        unseen: Mask,
        blocks: Sequence[Suspicion],
        rng: np.random.Generator,
    ) -> ImageSet:
        """Take rows to learn from; small classes concerned get an even share."""
        labels, fair = self.train.labels, len(drawn) // self.train.num_classes
        more = []
        for label in sorted({block.label for block in blocks}):
            own = rng.permutation(np.flatnonzero((labels == label) & ~unseen))
            known = int((labels[drawn] == label).sum())
            more.append(np.resize(own, fair - known if len(own) and known < fair / 2 else 0))
        return self.train.take(np.sort(np.concatenate([drawn, *more])))

    def _agreement(self, block: Suspicion, said: NDArray[np.int64], held: Mask) -> Agreement:
        others = held & (self.train.labels == block.label)
        own, usual = (said[rows] == block.label for rows in (block.rows, others))
        return Agreement(own, usual, 1 / self.train.num_classes)

    def _judge(
        self, block: Suspicion, found: Agreement, said: NDArray[np.int64], alarm: float
    ) -> FoundBlock:
        """Write down what the model made of a block."""
        scores = block.finding.block.scores[block.finding.flagged]
        suspected = found.contradicted(alarm) or block.lacking
        votes = np.bincount(said[block.rows], minlength=self.train.num_classes)
        return FoundBlock(
            label=block.label,
            rows=rows_of([block], len(self.train)),
            coherence=float(np.median(scores)),
            clean_coherence=float(block.finding.null.max()),
            expected_false=block.finding.expected_false,
            agreement=float(found.own.mean()),
            usual_agreement=found.base if len(found.usual) else None,
            num_held_out=len(found.usual),
            said=int(votes.argmax()),
            said_share=float(votes.max() / len(found.own)),
            p_value=found.p_value(int(found.own.sum())),
            suspected=suspected,
            lacking=block.lacking,
            unclear=not suspected and found.unclear(self.settings.alarm),
            alike=block.alike,
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
