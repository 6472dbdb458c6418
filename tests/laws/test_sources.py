"""Laws of every data source."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from defense.contracts import DataSource
from defense.datasets import AnyDataSource
from defense.datasets.digits import Digits
from defense.datasets.folder import Folder, read_images
from defense.datasets.hub import HubSource
from defense.errors import DataError
from defense.method import members

HUB = [method for method in members(AnyDataSource) if issubclass(method, HubSource)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write_tree(root: Path, *, formats=("png", "jpg", "webp"), side: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (side, side + 4, 3), dtype=np.uint8)
                suffix = formats[number % len(formats)]
                Image.fromarray(pixels).save(folder / f"{number}.{suffix}")
    return root


@pytest.fixture
def sources(tmp_path: Path) -> list[DataSource]:
    return [Digits(), Folder(path=str(write_tree(tmp_path)), image_size=8)]


def test_gives_a_split_with_unique_ids_and_every_class(sources: list[DataSource]) -> None:
    for source in sources:
        split = source.load(generator())
        for part in (split.train, split.test):
            assert set(part.labels) == set(range(part.num_classes))
            assert part.uint8().dtype == np.uint8
            assert part.images().max() <= 1
        ids = np.concatenate([split.train.ids, split.test.ids])
        assert len(set(ids)) == len(ids)
        assert split.train.class_names == split.test.class_names


def test_same_seed_same_rows(sources: list[DataSource]) -> None:
    for source in sources:
        first, second = (source.load(generator()) for _ in range(2))
        np.testing.assert_array_equal(first.train.ids, second.train.ids)
        np.testing.assert_array_equal(first.train.uint8(), second.train.uint8())


def test_subset_keeps_the_share_of_every_class() -> None:
    split = Digits(train_size=100).load(generator())
    counts = np.bincount(split.train.labels)
    assert counts.sum() == 100
    assert counts.min() >= 9
    assert counts.max() <= 11


def test_subset_is_drawn_before_decoding(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    source = Folder(path=str(root), image_size=8, train_size=2)
    kept = source.load(generator()).train.ids
    for file in (root / "train").glob("*/*"):
        if file.relative_to(root).as_posix() not in kept:
            file.write_bytes(b"not an image")
    np.testing.assert_array_equal(source.load(generator()).train.ids, kept)


def test_folder_keeps_pixels_of_the_right_size(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            pixels = np.arange(3 * 64, dtype=np.uint8).reshape(8, 8, 3)
            Image.fromarray(pixels).save(tmp_path / split / name / "0.png")
    loaded = Folder(path=str(tmp_path), image_size=8).load(generator()).train
    np.testing.assert_array_equal(loaded.uint8()[0], pixels.transpose(2, 0, 1))
    assert loaded.ids[0] == "train/a/0.png"


@pytest.mark.parametrize("method", HUB, ids=lambda method: method.__name__)
def test_missing_download_is_a_clear_error(method: type[HubSource], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set data\.download to true, or copy it there"):
        method(root=str(tmp_path)).load(generator())


@pytest.mark.parametrize("method", HUB, ids=lambda method: method.__name__)
def test_offline_download_is_a_clear_error(
    method: type[HubSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args, **_kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    with pytest.raises(DataError, match="check the network"):
        method(root=str(tmp_path), download=True).load(generator())


def test_cifar_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape torchvision gives is brought to ours."""
    from defense.datasets.hub import Cifar10

    class Fake:
        data = np.arange(4 * 32 * 32 * 3, dtype=np.uint8).reshape(4, 32, 32, 3)
        targets = (0, 1, 0, 1)
        classes = ("x", "y")

    monkeypatch.setattr(Cifar10, "fetch", lambda self, root, train: Fake)
    train = Cifar10(root=str(tmp_path)).load(generator()).train
    assert train.shape == (3, 32, 32)
    np.testing.assert_array_equal(train.uint8()[2], Fake.data[2].transpose(2, 0, 1))


def test_imagenette_is_named_by_its_classes(tmp_path: Path) -> None:
    """Folders carry WordNet ids; users think of names."""
    from torchvision.datasets import Imagenette as Source

    from defense.datasets.hub import Imagenette

    for split in ("train", "val"):
        for wnid in Source._WNID_TO_CLASS:
            folder = tmp_path / "imagenette2-160" / split / wnid
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "0.JPEG")
    train = Imagenette(root=str(tmp_path), image_size=8).load(generator()).train
    assert train.class_names[:2] == ("tench", "English springer")
    assert train.ids[0] == "train/n01440764/0.JPEG"


def break_tree(root: Path, kind: str) -> None:
    victim = root / "train" / "cat" / "0.png"
    if kind == "truncated":
        victim.write_bytes(victim.read_bytes()[:60])
    elif kind == "text":
        victim.write_text("hello")
    elif kind == "suffix":
        (victim.parent / "notes.txt").write_text("hello")
    elif kind == "empty":
        for file in victim.parent.iterdir():
            file.unlink()
    elif kind == "odd class":
        (root / "train" / "cow").mkdir()
    elif kind == "link out":
        outside = root.parent / f"{root.name}.png"
        victim.rename(outside)
        victim.symlink_to(outside)
    elif kind == "16 bit":
        Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(victim)
    elif kind == "pipe":
        os.mkfifo(victim.parent / "z.png")
    elif kind == "not utf-8":
        (victim.parent / os.fsdecode(b"\xe9.png")).write_bytes(victim.read_bytes())
    elif kind == "text bomb":
        facts = PngInfo()
        facts.add_text("x", "y" * 2_000_000, zip=True)
        Image.new("L", (8, 8)).save(victim, pnginfo=facts)
    elif kind == "bomb":
        Image.new("1", (9000, 9000)).save(victim)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "not a readable image"),
        ("text", "not a readable image"),
        ("suffix", "not a PNG, JPEG or WebP"),
        ("empty", "is empty"),
        ("odd class", "differ in the classes cow"),
        ("link out", "outside"),
        ("bomb", "9000x9000 pixels"),
        ("16 bit", "more than 8 bits"),
        ("pipe", "not a PNG, JPEG or WebP"),
        ("not utf-8", "not named in UTF-8"),
        ("text bomb", "not a readable image"),
    ],
)
def test_folder_refuses(tmp_path: Path, kind: str, message: str) -> None:
    root = write_tree(tmp_path / "tree", formats=("png",))
    break_tree(root, kind)
    with pytest.raises(DataError, match=message):
        Folder(path=str(root), image_size=8).load(generator())


def test_images_whose_names_cannot_be_written_down_are_refused(tmp_path: Path) -> None:
    """Before a scan of them, not when its answer is written."""
    tree = write_tree(tmp_path / "tree", formats=("png",)) / "train"
    images = read_images(tree, (1, 8, 8))
    assert images.ids.tolist() == sorted(f"{p.parent.name}/{p.name}" for p in tree.rglob("*.png"))
    (tree / os.fsdecode(b"\xe9")).mkdir()
    first = next(tree.rglob("*.png"))
    (tree / os.fsdecode(b"\xe9") / "a.png").write_bytes(first.read_bytes())
    with pytest.raises(DataError, match="not named in UTF-8"):
        read_images(tree, (1, 8, 8))


def test_folder_names_a_missing_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMEWHERE", "/no/such/place")
    with pytest.raises(DataError, match="/no/such/place/train"):
        Folder(path="$SOMEWHERE", image_size=8).load(generator())


@pytest.mark.parametrize("size", [1, 5000])
def test_refuses_an_impossible_size(size: int) -> None:
    source = Digits.model_construct(test_size=360, train_size=size)
    with pytest.raises(DataError, match=f"data.train_size is {size}"):
        source.load(generator())
