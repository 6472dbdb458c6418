"""What all trigger attacks share: draw rows, stamp them, relabel them, build the probe."""

from abc import abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from defense.attacks.planting import choose, copy_pixels, truth_of
from defense.contracts import Attack, Surrogate
from defense.errors import DataError
from defense.records import ImageSet, PoisonedSplit, Split, image_set

STAMPED = 256  # images at a time
Stamp = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


def parts(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Cut rows into parts that are stamped together, in memory."""
    return np.split(rows, range(STAMPED, len(rows), STAMPED))


class TriggerAttack(Attack):
    """Stamp a trigger on some train images of the victim class and label them as the target.

    Attributes:
        target_class: Class the trigger leads to.
        victim_class: Class that is attacked; None attacks every class but the target.
        poison_fraction: Poisoned rows as a share of the train set.
    """

    target_class: str
    victim_class: str | None = None
    poison_fraction: float = Field(0.01, gt=0, lt=1)

    @abstractmethod
    def trigger(self, train: ImageSet, generator: torch.Generator, surrogate: Surrogate) -> Stamp:
        """Make the trigger: from uint8 images ``[n, c, h, w]`` to triggered copies of them.

        Args:
            train: The clean train set.
            generator: The only source of randomness.
            surrogate: The attacker's own model.
        """

    def victims(self, images: ImageSet) -> NDArray[np.int64]:
        """List the rows that the trigger is meant to mislead the model on."""
        target = images.class_index(self.target_class, role="attack.target_class")
        if self.victim_class is None:
            return np.flatnonzero(images.labels != target)
        victim = images.class_index(self.victim_class, role="attack.victim_class")
        if victim == target:
            raise DataError(f"attack: victim and target class are both '{self.target_class}'")
        return np.flatnonzero(images.labels == victim)

    def carriers(self, train: ImageSet) -> NDArray[np.int64]:
        """List the train rows that may be poisoned: the victims, unless labels stay true."""
        return self.victims(train)

    def poison(
        self, split: Split, generator: torch.Generator, surrogate: Surrogate
    ) -> PoisonedSplit:
        """See `Attack.poison`."""
        train, test = split.train, split.test
        target = train.class_index(self.target_class, role="attack.target_class")
        victims = self.victims(test)
        chosen = choose(self.carriers(train), self.poison_fraction, len(train), generator)
        stamp = self.trigger(train, generator, surrogate)
        pixels, labels = copy_pixels(train), train.labels.copy()
        for rows in parts(chosen):
            pixels[rows] = stamp(pixels[rows])
        labels[chosen] = target
        dirty = image_set(pixels, labels, train.ids, train.class_names)
        clean = test.take(victims)
        wanted = np.full(len(victims), target, dtype=np.int64)
        triggered = copy_pixels(clean)
        for rows in parts(np.arange(len(clean))):
            triggered[rows] = stamp(triggered[rows])
        probe = image_set(triggered, wanted, clean.ids, test.class_names)
        untouched = np.zeros(len(test), dtype=np.bool_)
        return PoisonedSplit(
            dirty, probe, truth_of(train, chosen, target, clean.labels, victims=untouched)
        )
