"""Rows of a class that its clean inputs lack, found without an input that points to them.

Seen from the mean of clean inputs of a class, its rows scatter evenly, unless some have something
in common that clean inputs do not: then the mean of the rows lies in their direction. Poison with
correct labels (Witches' Brew, SIG) shows like this even where no input coheres with it. So does a
source of pictures that the test set does not draw on; that it is poison is for people to say.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from defense.detectors.coherence import Rows
from defense.detectors.controls import Controls, Finding
from defense.detectors.search import FEWEST, Coherence, Search
from defense.records import Mask

INPUTS = 200  # clean inputs of a class that it takes: half for the origin, half for controls
SHARE, SEEDS = 0.1, 1000  # of the rows of a class that become queries; number of them at most
ROUNDS = 10  # times they do, at most


@dataclass(frozen=True)
class Subpopulation:
    """What rows of a class cohere in that its clean inputs lack.

    Attributes:
        finding: Which of the rows, and how sure.
        places: Numbers of the rows that were looked at, ``[n]``.
        null: The clean inputs that they were compared with.
    """

    finding: Finding
    places: NDArray[np.int64]
    null: Controls

    def found(self, settings: Coherence) -> bool:
        """Tell whether it is more than chance, and a large share of its class."""
        large = self.finding.flagged.mean() >= settings.subpopulation
        return bool(large) and self.finding.chance <= settings.alarm

    @property
    def rows(self) -> NDArray[np.int64]:
        """Numbers of the rows that are flagged."""
        return self.places[self.finding.flagged]


def subpopulation(search: Search, label: int, explained: Mask) -> Subpopulation | None:
    """Look for rows of a class that have in common what its clean inputs lack.

    The search starts from the direction in which the mean of the rows lies. The rows that cohere
    most with it become queries, and so on, as in a search from an input.

    Args:
        search: Where to look.
        label: The class.
        explained: Rows that are not looked at, because something else explains them, bool ``[n]``.

    Returns:
        What was found, which may be nothing; None if there are too few clean inputs or rows.
    """
    places = np.flatnonzero((search.train.labels == label) & ~explained)
    vectors, settings = search.controls(label), search.settings
    if len(vectors) < INPUTS or len(places) * SHARE < FEWEST:
        return None
    half = len(vectors) // 2
    rows = Rows(search.directions.less(vectors[:half]), places)
    null = Controls(rows.directions.towards(vectors[half:]), settings.false_discovery_rate)
    block = rows.grow(rows.mean(), min(int(len(rows) * SHARE), SEEDS), ROUNDS)
    return Subpopulation(null.judge(rows, block, settings.rounds), places, null)
