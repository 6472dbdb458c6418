"""A model that was trained elsewhere, on data that were poisoned before, through the stages."""

import shutil
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from defense.artifacts import open_artifact
from defense.audit import flags_csv
from defense.records import ImageSet
from defense.storage import load_flags, load_images, load_truth, read_tensors
from tests.pipeline.conftest import ROOT, run, set_params, stage

KINDS = (("suspect", "model"), ("affected", "images"), ("poisoned_train", "images"))
NETWORK = """
from defense.models.small_cnn import SmallCnn

def make(num_classes):
    return SmallCnn().build((1, 8, 8), num_classes)
"""


def write_tree(images: ImageSet, folder: Path) -> None:
    """Write images as a tree class/file, by number."""
    for number, label in enumerate(images.labels):
        place = folder / images.class_names[label]
        place.mkdir(parents=True, exist_ok=True)
        pixels = images.uint8(slice(number, number + 1))[0, 0]
        Image.fromarray(pixels).save(place / f"{number:04}.png")


@pytest.fixture(scope="module")
def brought(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, weights and a wrongly classified image of the drill, as a stranger has them."""
    home = tmp_path_factory.mktemp("incident")
    train, test, probe = (
        load_images(clone / "artifacts" / name)[0] for name in ("poisoned_train", "test", "probe")
    )
    write_tree(train, home / "tree" / "train")
    write_tree(test, home / "tree" / "test")
    (home / "wrong").mkdir()
    Image.fromarray(probe.uint8(slice(0, 1))[0, 0]).save(home / "wrong" / "today.png")
    weights = read_tensors(clone / "artifacts" / "suspect" / "weights.safetensors")
    network = {name.removeprefix("network."): value for name, value in weights.items()}
    for part in ("mean", "std"):
        (home / part).write_text(str(network.pop(f"normalize.{part}").item()))
    torch.save(network, home / "model.pt")
    shutil.copy(clone / "params.yaml", home)
    source = {"name": "folder", "path": "tree", "image_size": 8, "channels": 1}
    model = {"name": "factory", "factory": "net:make"}
    (home / "net.py").write_text(NETWORK)
    set_params(home, lambda params: params.update(data=source, model=model))
    return home


def adopt(home: Path, *more: str) -> CompletedProcess[str]:
    numbers = [f"--{part}={(home / part).read_text()}" for part in ("mean", "std")]
    command = ("python", "-m", "pipelines.adopt", "--weights", "model.pt", *numbers)
    return run(home, *command, "--affected", "wrong", *more, PYTHONPATH=str(ROOT))


def test_finds_the_poison_of_a_model_that_was_trained_elsewhere(clone: Path, brought: Path) -> None:
    done = adopt(brought)
    assert done.returncode == 0, done.stderr
    target = yaml.safe_load((clone / "params.yaml").read_text())["attack"]["target_class"]
    assert f"the first, today.png, taken for {target}" in done.stdout
    for name in ("factors", "directions", "influence", "detect", "confirm", "remediate"):
        done = stage(brought, name, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
    assert run(brought, "defense", "scan").returncode == 1
    flags = load_flags(brought / "artifacts" / "flags")[0]
    train = load_images(brought / "artifacts" / "poisoned_train")[0]
    poisoned = load_truth(clone / "artifacts" / "truth")[0].poisoned
    planted = np.array([poisoned[int(Path(name).stem)] for name in train.ids])
    assert (flags.mask & planted).sum() > 0.9 * planted.sum()
    assert (flags.mask & planted).sum() > 0.8 * flags.mask.sum()
    assert len(flags_csv(train, flags).splitlines()) == 1 + flags.mask.sum()


def test_refuses_what_would_be_lost_or_wrong(brought: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(brought, home)
    weights = torch.load(home / "model.pt", weights_only=True)
    save_file(weights, home / "model.safetensors")
    assert adopt(home, "--weights", "model.safetensors").returncode == 0
    kept = {name: open_artifact(home / "artifacts" / name, kind).digest for name, kind in KINDS}
    torch.save({f"module.{name}": value for name, value in weights.items()}, home / "wrapped.pt")
    torch.save({name: value * torch.nan for name, value in weights.items()}, home / "nan.pt")
    (home / "empty").mkdir()
    for change, told in (
        (("--weights", "wrapped.pt"), "names too few"),
        (("--weights", "params.yaml"), "the state_dict of the network that section model"),
        (("--weights", "nan.pt"), "expected finite weights"),
        (("--mean", "0.1,0.2"), "for each of 1 channels, got [0.1"),
        (("--std", "0"), "a deviation above zero"),
        (("--mean", "nan"), "a finite mean"),
        (("--affected", "empty"), "expected PNG, JPEG or WebP files"),
    ):
        refused(adopt(home, *change), told)
    set_params(home, lambda params: params["data"].update(train_size=300))
    refused(adopt(home), "got 300 drawn from them: remove data.train_size")
    (home / "dvc.yaml").touch()
    refused(adopt(home), "dvc repro would train another")
    assert kept == {
        name: open_artifact(home / "artifacts" / name, kind).digest for name, kind in KINDS
    }
    (home / "dvc.yaml").unlink()
    set_params(home, lambda params: params["data"].pop("train_size"))
    plain = ("python", "-m", "pipelines.adopt", "--weights", "model.pt")
    assert run(home, *plain, PYTHONPATH=str(ROOT)).returncode == 0
    assert not (home / "artifacts" / "affected").exists(), "they were of the model before"


def refused(done: CompletedProcess[str], told: str) -> None:
    assert (done.returncode, told in done.stderr) == (2, True), done.stderr
    assert len(done.stderr.splitlines()) == 1
