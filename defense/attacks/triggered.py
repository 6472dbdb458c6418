"""What all trigger attacks share: draw victims, stamp them, relabel them, build the probe."""

from abc import abstractmethod
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from defense.compute import batches, pixel_store
from defense.contracts import Attack
from defense.errors import DataError
from defense.records import ImageSet, PoisonedSplit, Split, Truth, image_set


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
    def stamp(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Put the trigger on a copy of images: uint8 ``[n, c, h, w]``."""

    def victims(self, images: ImageSet) -> NDArray[np.int64]:
        """List the rows the attack is meant for."""
        target = images.class_index(self.target_class, role="attack.target_class")
        if self.victim_class is None:
            return np.flatnonzero(images.labels != target)
        victim = images.class_index(self.victim_class, role="attack.victim_class")
        if victim == target:
            raise DataError(f"attack: victim and target class are both '{self.target_class}'")
        return np.flatnonzero(images.labels == victim)

    def poison(self, split: Split, generator: torch.Generator) -> PoisonedSplit:
        """See `Attack.poison`."""
        train, test = split.train, split.test
        target = train.class_index(self.target_class, role="attack.target_class")
        victims = self.victims(train)
        count = round(self.poison_fraction * len(train))
        if not 0 < count <= len(victims):
            raise DataError(
                f"attack.poison_fraction asks for {count} poisoned rows, expected between 1 and "
                f"{len(victims)} (train rows of the victim class)"
            )
        chosen = victims[torch.randperm(len(victims), generator=generator)[:count].numpy()]
        poisoned = np.zeros(len(train), dtype=np.bool_)
        poisoned[chosen] = True
        pixels, labels = pixel_store((len(train), *train.shape)), train.labels.copy()
        for rows in batches(len(train), 4096, label="copy"):
            pixels[rows] = train.uint8(rows)
        pixels[poisoned] = self.stamp(pixels[poisoned])
        labels[poisoned] = target
        dirty = image_set(pixels, labels, train.ids, train.class_names)
        probe, probe_labels = self._probe(test, target)
        return PoisonedSplit(dirty, probe, Truth(poisoned, train.labels, target, probe_labels))

    def _probe(self, test: ImageSet, target: int) -> tuple[ImageSet, NDArray[np.int64]]:
        rows = self.victims(test)
        clean = replace(test, labels=test.labels[rows], ids=test.ids[rows], rows=test.rows[rows])
        labels = np.full(len(rows), target, dtype=np.int64)
        probe = image_set(self.stamp(clean.uint8()), labels, clean.ids, test.class_names)
        return probe, clean.labels
