"""All extension points on one page. A new method is one file and one line in a typed union.

| contract | verb | union |
|---|---|---|
| `DataSource` | `load` | `defense.datasets.AnyDataSource` |
| `Architecture` | `build` | `defense.models.AnyArchitecture` |
| `Attack` | `poison` | `defense.attacks.AnyAttack` |
| `Detector` | `detect` | `defense.detectors.AnyDetector` |
| `Unlearner` | `unlearn` | `defense.unlearning.AnyUnlearner` |

The unions are the registry, the schema of params.yaml and the list the law tests run over.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from defense.method import Method
from defense.phases import Phase
from defense.recipe import Recipe
from defense.records import Case, Flags, ImageSet, PoisonedSplit, Split, Trained


class DataSource(Method):
    """Where images come from."""

    @abstractmethod
    def load(self, generator: torch.Generator) -> Split:
        """Load the train and test sets.

        Args:
            generator: The only source of randomness (splits, subsets).

        Raises:
            DataError: The data are missing, corrupt, or a class is empty.
        """


class Architecture(Method):
    """What network is trained."""

    @abstractmethod
    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Build an untrained network.

        Args:
            shape: Channels, height and width of an image.
            num_classes: Number of logits.

        Returns:
            A module from normalised float images ``[n, c, h, w]`` to logits ``[n, k]``.
        """


@dataclass(frozen=True)
class Surrogate:
    """The attacker's own model of the same architecture and recipe, trained on clean data.

    Attributes:
        recipe: What is known of the victim's training, augmentation above all.
        model: Returns the model; trains it on the first call.
        scratch: Folder for checkpoints of an unfinished crafting.
    """

    recipe: Recipe
    model: Callable[[], nn.Module]
    scratch: Path | None


class Attack(Method):
    """How the training set is poisoned."""

    @abstractmethod
    def poison(
        self, split: Split, generator: torch.Generator, surrogate: Surrogate
    ) -> PoisonedSplit:
        """Plant the attack; the given split stays as it is.

        Args:
            split: The clean data.
            generator: The only source of randomness.
            surrogate: The attacker's own model, trained when it is first asked for.

        Returns:
            The poisoned train set with the same rows, the probe, and the truth.

        Raises:
            DataError: A class does not exist or has too few rows.
        """


class Detector(Method):
    """Which train rows made the affected inputs go wrong."""

    @abstractmethod
    def detect(self, case: Case, generator: torch.Generator, scratch: Path | None = None) -> Flags:
        """Give every train row a suspicion and decide which rows are flagged.

        Args:
            case: All a detector may know; the model and data stay as they are.
            generator: The only source of randomness.
            scratch: Folder for checkpoints of a detector that trains.
        """


class Tune(Protocol):
    """Trains a copy of a model through a sequence of phases, with one optimiser."""

    def __call__(
        self,
        model: nn.Module,
        phases: Sequence[Phase],
        recipe: Recipe,
        *,
        frozen: Collection[str] = (),
    ) -> Trained:
        """Train.

        Args:
            model: Where to start; it stays as it is.
            phases: What is trained on, one after the other.
            recipe: Learning rate, optimiser, batch size, augmentation.
            frozen: Names of parameters that keep their values.
        """


@dataclass(frozen=True)
class Trainer:
    """The victim's training, already bound to architecture, recipe, seed and scratch folder.

    Attributes:
        recipe: The recipe the suspect model was trained with.
        fresh: Builds an untrained model like the suspect one.
        fit: Trains a fresh model on a set.
        tune: Trains a given model further, on a copy.
        seeds: Returns a generator for one named purpose.
    """

    recipe: Recipe
    fresh: Callable[[ImageSet], nn.Module]
    fit: Callable[[ImageSet], Trained]
    tune: Tune
    seeds: Callable[[str], torch.Generator]


@dataclass(frozen=True)
class Repair:
    """What an unlearner is given. There is no field for truth or test data, by construction.

    Attributes:
        model: The suspect model; it stays as it is.
        forget: The flagged rows; may be empty.
        retain: The rows that are left.
        affected: The inputs the investigation started from, labelled as predicted.
    """

    model: nn.Module
    forget: ImageSet
    retain: ImageSet
    affected: ImageSet


class Unlearner(Method):
    """How the effect of flagged rows is removed."""

    @abstractmethod
    def max_gradient_samples(self, num_forget: int, num_retain: int, recipe: Recipe) -> int:
        """Declare the most per-sample gradients an unlearning may take.

        Args:
            num_forget: Flagged rows.
            num_retain: Rows that are left.
            recipe: The recipe the suspect model was trained with.
        """

    @abstractmethod
    def remove(self, repair: Repair, trainer: Trainer) -> Trained:
        """Remove the effect of at least one flagged row.

        Args:
            repair: The model and the rows.
            trainer: Trains without any view of test data.

        Returns:
            The remediated model and the per-sample gradients spent.
        """

    def unlearn(self, repair: Repair, trainer: Trainer) -> Trained:
        """Return a model as if the forget set had never been trained on.

        If nothing is flagged, nothing is done. The arguments and the result are those of
        `remove`.
        """
        return self.remove(repair, trainer) if len(repair.forget) else Trained(repair.model, 0)
