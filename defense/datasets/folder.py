"""Any tree of images, ``split/class/file``."""

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from defense.compute import batches, pixel_store
from defense.contracts import DataSource
from defense.datasets.selection import stratified
from defense.errors import DataError
from defense.records import ImageSet, Split, image_set

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_PIXELS = 64_000_000  # an image that decodes to more is refused before it is decoded
MODES = {1: "L", 3: "RGB"}


class Folder(DataSource):
    """Images in ``path/split/class/file``; PNG, JPEG and WebP.

    Attributes:
        path: The tree's root; ``~`` and environment variables are expanded.
        image_size: Side of the square images are resized to, shorter side first, and then
            cropped to at the centre.
        channels: 3 for colour, 1 for grey.
        train_split: Folder of the train set.
        test_split: Folder of the test set.
        train_size: Train rows to keep, drawn evenly over classes; None keeps all.
        test_size: Test rows to keep; None keeps all.
    """

    name: Literal["folder"] = "folder"
    path: str
    image_size: int = Field(gt=0, le=1024)
    channels: Literal[1, 3] = 3
    train_split: str = "train"
    test_split: str = "test"
    train_size: int | None = Field(None, gt=0)
    test_size: int | None = Field(None, gt=0)

    def load(self, generator: torch.Generator) -> Split:
        """See `DataSource.load`; only the rows that are kept are decoded."""
        root = Path(os.path.expandvars(self.path)).expanduser()
        train, test = root / self.train_split, root / self.test_split
        names, others = _classes(train), _classes(test)
        if names != others:
            odd = ", ".join(sorted(set(names) ^ set(others)))
            raise DataError(f"data.path: {train} and {test} differ in the classes {odd}")
        first = self._load(train, names, self.train_size, "train_size", generator)
        return Split(first, self._load(test, names, self.test_size, "test_size", generator))

    def _load(
        self,
        folder: Path,
        names: tuple[str, ...],
        size: int | None,
        role: str,
        generator: torch.Generator,
    ) -> ImageSet:
        groups = [_files(folder / name) for name in names]
        files = [file for group in groups for file in group]
        labels = np.repeat(np.arange(len(names)), [len(group) for group in groups])
        rows = stratified(labels, size, generator, role=role)
        pixels = pixel_store((len(rows), self.channels, self.image_size, self.image_size))
        for batch in batches(len(rows), 64, label=f"decode {folder.name}"):
            for row in batch:
                pixels[row] = self._decode(files[rows[row]])
        ids = np.array([files[row].relative_to(folder.parent).as_posix() for row in rows])
        return image_set(pixels, labels[rows], ids, names)

    def _decode(self, file: Path) -> NDArray[np.uint8]:
        """Decode one image to uint8 ``[c, size, size]``."""
        try:
            with Image.open(file, formats=sorted(set(FORMATS.values()))) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(
                        f"{file} has {image.width}x{image.height} pixels, expected at most "
                        f"{MAX_PIXELS}: remove it"
                    )
                if image.mode[0] in "IF":
                    raise DataError(
                        f"{file} has more than 8 bits per channel (mode {image.mode}): convert it"
                    )
                upright = ImageOps.exif_transpose(image).convert(MODES[self.channels])
        except (
            UnidentifiedImageError,
            Image.DecompressionBombError,
            OSError,
            SyntaxError,
            ValueError,
        ) as error:
            raise DataError(f"{file} is not a readable image ({error}): remove it") from error
        side = self.image_size
        if upright.size != (side, side):
            upright = ImageOps.fit(upright, (side, side), Image.Resampling.BILINEAR)
        pixels = np.asarray(upright).reshape(side, side, self.channels)
        return pixels.transpose(2, 0, 1)


def read_images(folder: Path, shape: tuple[int, int, int]) -> ImageSet:
    """Read the images in a folder and the folders below it, without labels.

    Args:
        folder: Its hidden files are left out.
        shape: Channels, height and width they are brought to, as by `Folder`.

    Raises:
        DataError: There are none, one is not readable, or images are not to be square.
    """
    channels, height, width = shape
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in FORMATS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files or height != width:
        raise DataError(
            f"expected PNG, JPEG or WebP files in {folder} for square images, got {len(files)} "
            f"for {height} x {width}"
        )
    names = [file.relative_to(folder) for file in files]
    for name in names:
        for part in (name, *name.parents):
            _text(part)
    reader = Folder(path=str(folder), image_size=height, channels=1 if channels == 1 else 3)
    pixels = pixel_store((len(files), *shape))
    for batch in batches(len(files), 64, label=f"decode {folder.name}"):
        for row in batch:
            pixels[row] = reader._decode(files[row])
    ids = np.array([name.as_posix() for name in names])
    return image_set(pixels, np.zeros(len(files), dtype=np.int64), ids, ("unknown",))


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(f"data.path: expected a folder {folder} with one folder per class")
    names = sorted(_text(p) for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        raise DataError(f"data.path: expected at least 2 class folders in {folder}, got {names}")
    return tuple(names)


def _text(path: Path) -> str:
    """Return a name that can be written down."""
    try:
        path.name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{str(path)!a} is not named in UTF-8: rename it") from error
    return path.name


def _files(folder: Path) -> list[Path]:
    """List the images of a class, hidden files aside; nothing may lie outside the tree."""
    root = folder.parent.parent.resolve()
    files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    for file in files:
        if Path(_text(file)).suffix.lower() not in FORMATS or not file.is_file():
            raise DataError(f"{file} is not a PNG, JPEG or WebP file: remove it")
        if not file.resolve().is_relative_to(root):
            raise DataError(f"{file} is a link to {file.resolve()}, outside {root}: copy the file")
    if not files:
        raise DataError(f"class folder {folder} is empty; add images or remove it")
    return files
