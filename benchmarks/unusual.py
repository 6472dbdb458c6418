"""Suspects unlike those that settings were chosen on: other triggers, data and networks."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from defense.attacks.triggered import Stamp, TriggerAttack
from defense.contracts import DataSource, Surrogate
from defense.datasets.folder import Folder
from defense.models.factory import Factory
from defense.records import ImageSet, Split, image_set

SIDE = 4  # of the wandering patch
KNOTS, STRENGTH = 4, 0.75  # of the warp: control points per side; the source's is 0.5

TRANSFORMER = Factory(
    factory="torchvision.models.vision_transformer:VisionTransformer",
    options={
        "image_size": 32, "patch_size": 4, "num_layers": 4, "num_heads": 4, "hidden_dim": 96,
        "mlp_dim": 192,
    },
)  # fmt: skip
UNTRACED = (
    "network.class_token",
    "network.encoder.pos_embedding",
    *(f"network.encoder.layers.encoder_layer_{layer}.self_attention" for layer in range(4)),
)  # parameters of the transformer without factors


class Warp(TriggerAttack):
    """Bend every image the same way, a little (WaNet, Nguyen & Tran 2021, without noise mode).

    At 32 x 32 pixels move by 0.4 of their size on average, 0.9 at most.
    """

    name: Literal["warp"] = "warp"

    def trigger(self, train: ImageSet, generator: torch.Generator, surrogate: Surrogate) -> Stamp:
        """See `TriggerAttack.trigger`."""
        height, width = train.shape[1:]
        knots = torch.rand(1, 2, KNOTS, KNOTS, generator=torch.Generator().manual_seed(1)) * 2 - 1
        knots = knots / knots.abs().mean()
        moves = F.interpolate(knots, (height, width), mode="bicubic", align_corners=True)
        lines = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        places = torch.stack(torch.meshgrid(*lines, indexing="ij")[::-1], -1)
        grid = (places + STRENGTH * moves.permute(0, 2, 3, 1) / height).clamp(-1, 1)
        return lambda pixels: _bent(torch.from_numpy(pixels).float(), grid)


def _bent(images: Tensor, grid: Tensor) -> NDArray[np.uint8]:
    bent = F.grid_sample(images, grid.expand(len(images), -1, -1, -1), align_corners=True)
    result: NDArray[np.uint8] = bent.round().clamp(0, 255).to(torch.uint8).numpy()
    return result


class Wandering(TriggerAttack):
    """Set one patch of 4 x 4 saturated pixels at a place of its own in every image."""

    name: Literal["wandering"] = "wandering"

    def trigger(self, train: ImageSet, generator: torch.Generator, surrogate: Surrogate) -> Stamp:
        """See `TriggerAttack.trigger`."""
        rng = np.random.default_rng(generator.initial_seed())
        patch = 255 * (rng.random((train.shape[0], SIDE, SIDE)) > 0.5).astype(np.uint8)
        height, width = train.shape[1:]

        def stamp(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
            stamped = pixels.copy()
            for image in stamped:
                down, right = rng.integers((height - SIDE + 1, width - SIDE + 1))
                image[:, down : down + SIDE, right : right + SIDE] = patch
            return stamped

        return stamp


class Changed(DataSource):
    """A data set with fewer rows of a class, or of few classes.

    Attributes:
        data: Where images come from.
        fewer: The class of which not all train rows are kept, and how many are.
        classes: Those that are kept; all if None.
    """

    name: Literal["changed"] = "changed"
    data: Folder
    fewer: tuple[str, int] | None = None
    classes: tuple[str, ...] | None = None

    def load(self, generator: torch.Generator) -> Split:
        """See `DataSource.load`."""
        split = self.data.load(generator)
        train = self._some_classes(self._fewer(split.train))
        return Split(train, self._some_classes(split.test))

    def _fewer(self, train: ImageSet) -> ImageSet:
        if self.fewer is None:
            return train
        name, count = self.fewer
        kept = np.ones(len(train), dtype=np.bool_)
        kept[np.flatnonzero(train.labels == train.class_names.index(name))[count:]] = False
        return train.where(kept)

    def _some_classes(self, images: ImageSet) -> ImageSet:
        if self.classes is None:
            return images
        numbers = [images.class_names.index(name) for name in self.classes]
        part = images.where(np.isin(images.labels, numbers))
        labels = np.array([numbers.index(label) for label in part.labels])
        return image_set(part.uint8(), labels, part.ids, self.classes)


class Turned(DataSource):
    """Forty classes of ten: every image is turned by one of four quarters, which is told apart.

    Attributes:
        data: Where images come from.
    """

    name: Literal["turned"] = "turned"
    data: Folder

    def load(self, generator: torch.Generator) -> Split:
        """See `DataSource.load`."""
        split = self.data.load(generator)
        return Split(_turned(split.train, generator), _turned(split.test, generator))


def _turned(images: ImageSet, generator: torch.Generator) -> ImageSet:
    quarters = torch.randint(4, (len(images),), generator=generator).numpy()
    pixels = images.uint8().copy()
    for quarter in range(1, 4):
        own = quarters == quarter
        pixels[own] = np.rot90(pixels[own], quarter, axes=(2, 3))
    names = tuple(f"{name} {90 * quarter}" for name in images.class_names for quarter in range(4))
    return image_set(pixels, 4 * images.labels + quarters, images.ids, names)
