"""Rows of a class that its clean inputs lack, found without an input that points to them.

Seen from the mean of clean inputs of a class and in their metric, its rows scatter evenly, unless
some have something in common that clean inputs do not: then the mean of the rows lies in their
direction. Poison with
correct labels (Witches' Brew, SIG) shows like this even where no input coheres with it. So does a
source of pictures that the test set does not draw on.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from defense.detectors.coherence import Rows
from defense.detectors.controls import Controls, Finding
from defense.detectors.search import FEWEST, Search
from defense.detectors.whitening import Whitened
from defense.records import Mask

FEWEST_INPUTS = 200  # clean inputs of a class; half are for the metric, half for controls
SHARE, SEEDS = 0.1, 1000  # of the rows of a class that become queries; number of them at most
ROUNDS = 10  # times they do, at most


@dataclass(frozen=True)
class Subpopulation:
    """What rows of a class have in common that its clean inputs lack.

    Attributes:
        rows: Their numbers in the training set, ascending; none if they are too few to be told.
        places: Numbers of the rows that were looked at, ascending, ``[m]``.
        finding: What was found among these, before its size was asked for.
    """

    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    finding: Finding


def subpopulation(search: Search, label: int, explained: Mask) -> Subpopulation | None:
    """Look for rows of a class that have in common what its clean inputs lack.

    The search starts from the direction in which the mean of the rows lies. The rows that cohere
    most with it become queries, and so on, as in a search from an input. What is flagged then at
    the promised false-discovery rate is told if it is a large enough share of the class.

    Args:
        search: Where to look, and what share is large enough.
        label: The class.
        explained: Rows that are not looked at, because something else explains them, bool ``[n]``.

    Returns:
        What was found, which may be nothing; None if there are too few clean inputs or rows, or
        nothing is to be looked for.
    """
    places = np.flatnonzero((search.train.labels == label) & ~explained)
    vectors, settings = search.controls(label), search.settings
    few = len(vectors) < FEWEST_INPUTS or len(places) * SHARE < FEWEST
    if few or settings.subpopulation is None:
        return None
    half, rows = len(vectors) // 2, Rows(search.directions, places)
    seen = Whitened.by(rows.directions, vectors[:half])
    null = Controls(seen.towards(vectors[half:]), settings.false_discovery_rate)
    rows = rows.seen(seen)
    block = rows.grow(rows.mean(), min(int(len(rows) * SHARE), SEEDS), ROUNDS)
    finding = null.judge(rows, block, settings.rounds, one_cause=False)
    enough = settings.subpopulation * (search.train.labels == label).sum()
    told = places[finding.flagged] if finding.flagged.sum() >= enough else places[:0]
    return Subpopulation(told, places, finding)
