"""Sets that torchvision knows how to fetch; downloaded only when asked to."""

import os
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from defense.contracts import DataSource
from defense.datasets.folder import Folder
from defense.datasets.selection import stratified
from defense.errors import DataError
from defense.records import ImageSet, Split, image_set


class HubSource(DataSource):
    """A set that torchvision reads from, or downloads to, a folder.

    Attributes:
        root: Folder the set lies in; ``~`` and environment variables are expanded.
        download: Fetch the set if it is not there.
        train_size: Train rows to keep, drawn evenly over classes; None keeps all.
        test_size: Test rows to keep; None keeps all.
    """

    name: str
    root: str = "data"
    download: bool = False
    train_size: int | None = Field(None, gt=0)
    test_size: int | None = Field(None, gt=0)

    @abstractmethod
    def fetch(self, root: Path, train: bool) -> Any:
        """Build torchvision's data set of one split."""

    def open(self, train: bool) -> Any:
        """Build torchvision's data set, with a clear error if it cannot be had.

        Raises:
            DataError: The set is not there, or could not be downloaded.
        """
        root = Path(os.path.expandvars(self.root)).expanduser()
        try:
            return self.fetch(root, train)
        except (OSError, RuntimeError) as error:
            remedy = (
                "check the network, or fetch it elsewhere and copy it there"
                if self.download
                else "set data.download to true, or copy it there"
            )
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"data: {self.name} could not be read from {root} ({reason}); {remedy}"
            ) from error

    def load(self, generator: torch.Generator) -> Split:
        """See `DataSource.load`."""
        train = self._select(self.open(True), "train", self.train_size, generator)
        return Split(train, self._select(self.open(False), "test", self.test_size, generator))

    def _select(
        self, source: Any, split: str, size: int | None, generator: torch.Generator
    ) -> ImageSet:
        labels = np.asarray(source.targets, dtype=np.int64)
        rows = stratified(labels, size, generator, role=f"{split}_size")
        pixels = np.asarray(source.data)[rows]
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        ids = np.array([f"{split}/{row:05d}" for row in rows])
        return image_set(np.ascontiguousarray(pixels), labels[rows], ids, tuple(source.classes))


class Cifar10(HubSource):
    """CIFAR-10: 50,000 train and 10,000 test colour images of 32x32 pixels in 10 classes."""

    name: Literal["cifar10"] = "cifar10"

    def fetch(self, root: Path, train: bool) -> Any:
        """See `HubSource.fetch`."""
        from torchvision.datasets import CIFAR10

        return CIFAR10(root, train, download=self.download)


class Cifar100(HubSource):
    """CIFAR-100: 50,000 train and 10,000 test colour images of 32x32 pixels, 100 classes."""

    name: Literal["cifar100"] = "cifar100"

    def fetch(self, root: Path, train: bool) -> Any:
        """See `HubSource.fetch`."""
        from torchvision.datasets import CIFAR100

        return CIFAR100(root, train, download=self.download)


class FashionMnist(HubSource):
    """Fashion-MNIST: 60,000 train and 10,000 test grey images of 28x28 pixels, 10 classes."""

    name: Literal["fashion_mnist"] = "fashion_mnist"

    def fetch(self, root: Path, train: bool) -> Any:
        """See `HubSource.fetch`."""
        from torchvision.datasets import FashionMNIST

        return FashionMNIST(root, train, download=self.download)


class Imagenette(HubSource):
    """Imagenette, the 160-pixel edition: 9,469 train and 3,925 test images, 10 classes.

    Attributes:
        image_size: Side of the square the images are resized and cropped to.
    """

    name: Literal["imagenette"] = "imagenette"
    image_size: int = Field(64, gt=0)

    def fetch(self, root: Path, train: bool) -> Any:
        """See `HubSource.fetch`."""
        from torchvision.datasets import Imagenette as Source

        split, there = ("train" if train else "val"), (root / "imagenette2-160").is_dir()
        return Source(root, split, "160px", download=self.download and not there)

    def load(self, generator: torch.Generator) -> Split:
        """See `DataSource.load`; once fetched, it is a plain folder in the order of WordNet ids."""
        names = tuple(str(aliases[0]) for aliases in self.open(True).classes)
        folder = Folder(
            path=f"{self.root}/imagenette2-160",
            image_size=self.image_size,
            test_split="val",
            train_size=self.train_size,
            test_size=self.test_size,
        )
        split = folder.load(generator)
        return Split(*(replace(part, class_names=names) for part in (split.train, split.test)))
