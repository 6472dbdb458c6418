"""Bad input: one clear line, exit code 2, and earlier artefacts as they were."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pipeline.conftest import run, set_params, stage


def snapshot(home: Path) -> dict[str, bytes]:
    folders = (home / "artifacts", home / "reports")
    return {
        str(path): path.read_bytes() for f in folders for path in f.rglob("*") if path.is_file()
    }


def refuse(home: Path, name: str, message: str) -> None:
    """Run a stage that must fail in one line and leave everything as it was."""
    before = snapshot(home)
    done = stage(home, name)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in done.stderr
    assert snapshot(home) == before


PARAMS: dict[str, tuple[str, Callable[[dict], object], str]] = {
    "unknown parameter": (
        "data", lambda p: p["gate"].update(max_prs=1), "gate.max_prs: Extra inputs",
    ),
    "unknown class": (
        "poison", lambda p: p["attack"].update(target_class="cat"), "'cat' does not exist",
    ),
    "too many poisons": (
        "poison", lambda p: p["attack"].update(poison_fraction=0.5), "asks for 350 poisoned rows",
    ),
    "model without layers": (
        "train",
        lambda p: p.update(model={"name": "factory", "factory": "tests.networks:layerless"}),
        "at least one Linear or Conv2d",
    ),
    "network that breaks": (
        "train",
        lambda p: p.update(model={"name": "factory", "factory": "tests.networks:broken"}),
        "takes images 1x8x8, got: no such luck",
    ),
    "network without logits": (
        "train",
        lambda p: p.update(model={"name": "factory", "factory": "tests.networks:pair"}),
        "expected logits [1, 10] for an image 1x8x8, got tuple",
    ),
    "network of another number of classes": (
        "train",
        lambda p: p.update(model={"name": "factory", "factory": "tests.networks:narrow"}),
        "got [1, 3]",
    ),
    "factory that is not there": (
        "train",
        lambda p: p.update(model={"name": "factory", "factory": "tests.networks:missing"}),
        "expected 'package.module:callable'",
    ),
    "model for larger images": (
        "train", lambda p: p.update(model={"name": "resnet9"}), "takes images 1x8x8",
    ),
    "weights that do not fit": (
        "factors", lambda p: p["model"].update(width=8), "do not fit the model",
    ),
    "loss that is not finite": (
        "train", lambda p: p["train"].update(learning_rate=1e30), "lower learning_rate",
    ),
    "more affected than succeed": (
        "train", lambda p: p["affected"].update(count=100), "affected.count is 100",
    ),
    "attack that fails": (
        "train", lambda p: p["train"].update(epochs=1, learning_rate=1e-6), "affected.count is 1",
    ),
    "tolerance above the transforms": (
        "detect",
        lambda p: p.update(detector={"name": "delta_influence", "tolerance": 12}),
        "expected less than the number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PARAMS)
def test_parameters(home: Path, kind: str) -> None:
    name, change, message = PARAMS[kind]
    set_params(home, change)
    refuse(home, name, message)


def test_what_the_message_says_to_exclude_is_enough(home: Path) -> None:
    model = {"name": "factory", "factory": "tests.networks:positioned"}
    set_params(home, lambda params: params.update(model=model))
    refuse(home, "train", "add to factors.exclude: [network.places]")
    set_params(home, lambda params: params["factors"].update(exclude=["network.places"]))
    for name in ("train", "factors", "directions"):
        done = stage(home, name)
        assert done.returncode == 0, done.stderr


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file anew; DVC may have linked the old one."""
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["missing", "truncated", "edited", "from another run"])
def test_input_files(home: Path, damage: str) -> None:
    folder = home / "artifacts" / "suspect"
    weights = folder / "weights.safetensors"
    data = weights.read_bytes()
    if damage == "missing":
        shutil.rmtree(folder)
        message = "expected an artefact at artifacts/suspect, found none; run: dvc repro"
    elif damage == "truncated":
        replace_bytes(weights, data[:-10])
        message = "was truncated or edited"
    elif damage == "edited":
        replace_bytes(weights, data[:-1] + bytes([data[-1] ^ 1]))
        message = "was truncated or edited"
    else:
        set_params(home, lambda params: params.update(seed=1))
        assert stage(home, "data").returncode == 0
        assert stage(home, "poison").returncode == 0
        message = "was computed from another poisoned_train"
    refuse(home, "factors", message)


@pytest.mark.parametrize("kind", ["corrupt image", "empty class"])
def test_folders(home: Path, tmp_path: Path, kind: str) -> None:
    tree = tmp_path / "tree"
    for number, folder in enumerate(("train/3", "train/8", "test/3", "test/8")):
        (tree / folder).mkdir(parents=True)
        pixels = np.full((8, 8), 40 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(tree / folder / "0.png")
    victim = tree / "train" / "8" / "0.png"
    if kind == "empty class":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:40])
    source = {"name": "folder", "path": str(tree), "image_size": 8, "channels": 1}
    set_params(home, lambda params: params.update(data=source))
    refuse(home, "data", "is empty" if kind == "empty class" else "not a readable image")


def test_parameters_that_are_not_utf8(home: Path) -> None:
    (home / "params.yaml").write_bytes(b"seed: 0 # \xe9\n")
    refuse(home, "data", "is not YAML")


def test_unknown_stage_is_usage(home: Path) -> None:
    done = run(home, sys.executable, "-m", "pipelines", "cook")
    assert done.returncode == 2
    assert "'cook' is not one of" in done.stderr
