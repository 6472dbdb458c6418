"""Records: the frozen tables and tensors that travel between stages.

Row number is identity: a set of rows is a boolean mask over the train split, never a list of
indices, so a mask made for another split is refused.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from defense.errors import DataError
from defense.evidence import Directions, Incident

Mask = NDArray[np.bool_]
Tier = Literal["exact", "fast"]


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, possibly memory-mapped, possibly a selection of a larger store.

    Attributes:
        pixels: uint8 ``[N, c, h, w]``; the store, shared between selections.
        labels: int64 ``[n]``.
        ids: str ``[n]``; names of the samples that outlive any reordering.
        class_names: Name of every label.
        rows: int64 ``[n]``; the row of `pixels` each sample lies in.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    ids: NDArray[np.str_]
    class_names: tuple[str, ...]
    rows: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Check that the columns belong together."""
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4:
            raise DataError(
                f"expected uint8 pixels [n, c, h, w], got {self.pixels.dtype} {self.pixels.shape}"
            )
        if not len(self.labels) == len(self.ids) == len(self.rows):
            raise DataError(
                f"expected one label, id and row per sample, got {len(self.labels)} labels, "
                f"{len(self.ids)} ids and {len(self.rows)} rows"
            )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def where(self, mask: Mask) -> "ImageSet":
        """Select the samples where `mask` is True, without copying pixels.

        Args:
            mask: bool ``[n]``.

        Raises:
            DataError: The mask covers another number of samples.
        """
        if mask.dtype != np.bool_ or mask.shape != (len(self),):
            raise DataError(
                f"expected a boolean mask over {len(self)} samples, got {mask.dtype} "
                f"{mask.shape}: was it made for another split?"
            )
        return ImageSet(
            self.pixels, self.labels[mask], self.ids[mask], self.class_names, self.rows[mask]
        )

    def take(self, rows: NDArray[np.int64]) -> "ImageSet":
        """Select samples by number, in the order given; a number may come more than once.

        For work inside a stage; between stages a set of rows is a mask.
        """
        return ImageSet(
            self.pixels, self.labels[rows], self.ids[rows], self.class_names, self.rows[rows]
        )

    def uint8(self, index: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.uint8]:
        """Copy the pixels of some samples: uint8 ``[m, c, h, w]``."""
        return self.pixels[self.rows[index]]

    def images(self, index: NDArray[np.int64] | slice = slice(None)) -> Tensor:
        """Return some samples as float32 ``[m, c, h, w]`` in [0, 1]."""
        return torch.from_numpy(self.uint8(index)).float().div_(255)

    def targets(self, index: NDArray[np.int64] | slice = slice(None)) -> Tensor:
        """Return the labels of some samples as int64 ``[m]``."""
        return torch.from_numpy(self.labels[index].copy())

    def class_index(self, name: str, *, role: str) -> int:
        """Find the label of a class.

        Raises:
            DataError: No class has that name.
        """
        if name not in self.class_names:
            known = ", ".join(self.class_names[:20])
            raise DataError(f"{role} '{name}' does not exist; the classes are: {known}")
        return self.class_names.index(name)


def mask_of(rows: NDArray[np.int64], count: int) -> Mask:
    """Turn row numbers into a mask: bool ``[count]``."""
    mask = np.zeros(count, dtype=np.bool_)
    mask[rows] = True
    return mask


def image_set(
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    ids: NDArray[np.str_],
    class_names: tuple[str, ...],
) -> ImageSet:
    """Build an image set whose samples lie in the order of `pixels`."""
    return ImageSet(pixels, labels, ids, class_names, np.arange(len(pixels)))


@dataclass(frozen=True)
class Split:
    """A train and a test set of the same classes."""

    train: ImageSet
    test: ImageSet


@dataclass(frozen=True)
class Truth:
    """What was planted. No detector and no unlearner can read it.

    Attributes:
        poisoned: bool ``[n]`` over the train split.
        original_labels: int64 ``[n]``; labels before the attack.
        target_class: Label the attack wants.
        probe_labels: int64 ``[p]``; true labels of the probe images.
        victims: bool ``[t]`` over the test split; images that are attacked as they are, without
            a trigger, and therefore do not count for clean accuracy.
    """

    poisoned: Mask
    original_labels: NDArray[np.int64]
    target_class: int
    probe_labels: NDArray[np.int64]
    victims: Mask


@dataclass(frozen=True)
class PoisonedSplit:
    """What an attack leaves behind.

    Attributes:
        train: The poisoned train set, same rows as the clean one.
        probe: Attacked test images (most attacks put a trigger on them) whose true class is
            not the target, labelled with the target class; the share a model sends there is
            its poison success rate.
        truth: What was planted.
    """

    train: ImageSet
    probe: ImageSet
    truth: Truth


@dataclass(frozen=True)
class LayerFactors:
    """EK-FAC factors of one layer with `g` groups, `o` outputs and `i` inputs per group.

    Attributes:
        activation_eigenvectors: ``[g, i, i]``, columns; `i` counts the bias if there is one.
        gradient_eigenvectors: ``[g, o, o]``, columns.
        lambda_matrix: ``[g, o, i]``; mean squared per-sample gradient in that basis.
    """

    activation_eigenvectors: Tensor
    gradient_eigenvectors: Tensor
    lambda_matrix: Tensor


@dataclass(frozen=True)
class Coverage:
    """Which parameters influence accounts for.

    Attributes:
        share: Share of the model's parameters that the treated layers hold.
        left_out: Kind of every module left out, with its number of parameters.
    """

    share: float
    left_out: dict[str, int]

    def __str__(self) -> str:
        """Say it in one line."""
        parts = [f"{kind} ({count:,})" for kind, count in self.left_out.items()]
        rest = f"; left out: {', '.join(parts)}" if parts else ""
        return f"{self.share:.2%} of the parameters{rest}"


@dataclass(frozen=True)
class Factors:
    """EK-FAC factors of a model.

    Attributes:
        layers: Factors by layer name, in the order the layers run.
        num_examples: Training rows they stand for.
        model: Digest of the model they were fitted on.
        coverage: Which parameters the layers hold.
        tier: ``exact`` or ``fast``.
        num_differentiated: Rows whose gradients were taken; those of the others are negligible.
        left_out: Share of the squared loss gradients, at the outputs, that those others hold.
        error: Share of a layer's Lambda that they hold, of the layer where it is largest;
            estimated on a few of them.
        excluded: Names of the modules that were left out on request.
    """

    layers: dict[str, LayerFactors]
    num_examples: int
    model: str
    coverage: Coverage
    tier: Tier
    num_differentiated: int
    left_out: float
    error: float
    excluded: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say in one line what they were fitted on."""
        return (
            f"{self.tier} tier, {len(self.layers)} layers with {self.coverage}; gradients of "
            f"{self.num_differentiated:,} of {self.num_examples:,} rows, the others hold "
            f"{self.left_out:.2%} of the squared loss gradients, and at most about "
            f"{self.error:.2%} of a layer's Lambda"
        )


CHANGES = ("none", "both", "image", "label")
Change = Literal["both", "image", "label"]


@dataclass(frozen=True)
class Queries:
    """The affected inputs and their transforms, ready to be scored.

    Attributes:
        images: float32 ``[q, c, h, w]`` in [0, 1].
        labels: int64 ``[q]``; the label whose margin is differentiated.
        affected: int64 ``[q]``; which affected input the query comes from.
        change: int64 ``[q]``; what of the affected input was changed, a number in `CHANGES`.
    """

    images: Tensor
    labels: Tensor
    affected: Tensor
    change: Tensor

    def changed(self, what: str) -> Mask:
        """Mark the queries with a change, or with ``none``: bool ``[q]``."""
        return self.change.numpy() == CHANGES.index(what)


@dataclass(frozen=True)
class Case:
    """What a detector may know. There is no field for truth, by construction.

    Attributes:
        train: The suspect training set.
        model: The suspect model.
        queries: What was scored.
        scores: float32 ``[q, n]``; influence of every train row on every query. Positive:
            the row supports the query's label.
        directions: Directions of the train rows.
        controls: Clean inputs that nobody complained about.
    """

    train: ImageSet
    model: nn.Module
    queries: Queries
    scores: NDArray[np.float32]
    directions: Directions | None = None
    controls: ImageSet | None = None


@dataclass(frozen=True)
class Flags:
    """A detector's answer, one entry per train row.

    Attributes:
        suspicion: float32 ``[n]``; higher is worse.
        threshold: A candidate row is flagged when its suspicion is above this value.
        candidates: bool ``[n]``; rows the rule was applied to.
        predicted_label: bool ``[n]``; rows that carry the label of an affected input, so that
            reports can show the rule restricted to them and unrestricted, side by side.
        incidents: What the affected inputs implicate, by a detector that judges them.
        p_values: float64 ``[n]``; of flagged rows, by a detector that knows it, the chance that a
            clean input coheres as much with their block, not adjusted; NaN of others.
    """

    suspicion: NDArray[np.float32]
    threshold: float
    candidates: Mask
    predicted_label: Mask
    incidents: tuple[Incident, ...] = ()
    p_values: NDArray[np.float64] | None = None

    @property
    def mask(self) -> Mask:
        """Flagged rows: bool ``[n]``."""
        return self.candidates & (self.suspicion > self.threshold)

    @property
    def verdict(self) -> str:
        """What is worst: flagged rows, a hint at some, affected inputs that were not judged."""
        if self.mask.any():
            return "poison found"
        if any(incident.untold for incident in self.incidents):
            return "poison suspected"
        unknown = any(one.affected and one.p_value is None for one in self.incidents)
        return "not measured" if unknown else "nothing found"


@dataclass(frozen=True)
class Trained:
    """A model, and how it was made.

    Attributes:
        model: The model.
        gradient_samples: Per-sample gradients that it took.
        chosen: Settings that the method chose by itself, by name.
    """

    model: nn.Module
    gradient_samples: int
    chosen: dict[str, float] = field(default_factory=dict)
