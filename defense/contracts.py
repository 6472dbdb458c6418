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
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from defense.method import Method
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


class Attack(Method):
    """How the training set is poisoned."""

    @abstractmethod
    def poison(self, split: Split, generator: torch.Generator) -> PoisonedSplit:
        """Plant the attack; the given split stays as it is.

        Args:
            split: The clean data.
            generator: The only source of randomness.

        Returns:
            The poisoned train set with the same rows, the probe, and the truth.

        Raises:
            DataError: A class does not exist or has too few rows.
        """


class Detector(Method):
    """Which train rows made the affected inputs go wrong."""

    @abstractmethod
    def detect(self, case: Case) -> Flags:
        """Give every train row a suspicion and decide which rows are flagged.

        Args:
            case: All a detector may know; the model and data stay as they are.
        """


@dataclass(frozen=True)
class Trainer:
    """The victim's training, already bound to architecture, recipe, seed and scratch folder.

    Attributes:
        recipe: The recipe the suspect model was trained with.
        fit: Trains a fresh model on a set.
        tune: Trains a given model further on a set with another recipe, on a copy.
    """

    recipe: Recipe
    fit: Callable[[ImageSet], Trained]
    tune: Callable[[nn.Module, ImageSet, Recipe], Trained]


class Unlearner(Method):
    """How the effect of flagged rows is removed."""

    @abstractmethod
    def unlearn(
        self, model: nn.Module, forget: ImageSet, retain: ImageSet, trainer: Trainer
    ) -> Trained:
        """Return a model as if the forget set had never been trained on.

        Args:
            model: The suspect model; it stays as it is.
            forget: The flagged rows.
            retain: The rows that are left.
            trainer: Trains without any view of test data.

        Returns:
            The remediated model and the per-sample gradients spent.
        """
