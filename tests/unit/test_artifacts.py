"""Sealed artefacts: equal bytes, and every kind of damage noticed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from defense.artifacts import open_artifact, require_input, write_artifact, write_text
from defense.errors import ArtifactError
from defense.records import Coverage, Factors, Flags, LayerFactors, Queries, Split, Truth
from defense.storage import (
    load_factors,
    load_flags,
    load_images,
    load_scores,
    load_truth,
    load_weights,
    save_factors,
    save_flags,
    save_images,
    save_model,
    save_scores,
    save_truth,
)


def network(width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, width), nn.BatchNorm1d(width))


def example_factors() -> Factors:
    generator = torch.Generator().manual_seed(0)
    layer = LayerFactors(*(torch.rand(1, 3, 3, generator=generator) for _ in range(3)))
    return Factors(
        {"first": layer, "second.0": layer},
        7,
        "ab",
        Coverage(0.5, {"LSTM": 9}),
        "fast",
        5,
        1e-3,
        2e-3,
        ("third",),
    )


def example_queries() -> Queries:
    numbers = torch.arange(2)
    return Queries(torch.rand(2, 1, 2, 2), numbers, numbers * 0, numbers)


def savers(split: Split):
    """Save every kind of record."""
    rows = len(split.train)
    mask = np.arange(rows) % 3 == 0
    queries, factors = example_queries(), example_factors()
    scores = np.random.default_rng(0).normal(size=(2, rows)).astype(np.float32)
    flags = Flags(scores[0], 0.5, ~mask, mask)
    truth = Truth(mask, split.train.labels, 1, np.zeros(4, dtype=np.int64), np.zeros(5, bool))
    return {
        "images": lambda path: save_images(path, split.train, inputs={"a": "b"}),
        "truth": lambda path: save_truth(path, truth, inputs={}),
        "model": lambda path: save_model(path, network(), meta={"gradient_samples": 3}),
        "factors": lambda path: save_factors(path, factors, inputs={}),
        "scores": lambda path: save_scores(path, queries, scores, inputs={}),
        "flags": lambda path: save_flags(path, flags, inputs={}),
    }


KINDS = ("images", "truth", "model", "factors", "scores", "flags")


@pytest.mark.parametrize("kind", KINDS)
def test_saving_twice_gives_equal_bytes(kind: str, split: Split, tmp_path: Path) -> None:
    save = savers(split)[kind]
    assert save(tmp_path / "one") == save(tmp_path / "two")
    assert save(tmp_path / "one") == save(tmp_path / "two")  # replacing changes nothing
    names = {path.name for path in (tmp_path / "one").iterdir()}
    for name in names:
        first, second = ((tmp_path / side / name).read_bytes() for side in ("one", "two"))
        assert first == second
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["truncate", "edit", "delete", "manifest", "version", "kind"])
def test_damage_is_noticed(kind: str, damage: str, split: Split, tmp_path: Path) -> None:
    savers(split)[kind](tmp_path / "x")
    manifest = tmp_path / "x" / "manifest.json"
    file = next(path for path in sorted((tmp_path / "x").iterdir()) if path != manifest)
    data = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(data[:-1])
    elif damage == "edit":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "delete":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        raw = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(raw | {damage: "other"}))
    with pytest.raises(ArtifactError, match=str(tmp_path / "x")):
        open_artifact(tmp_path / "x", kind)


def test_records_come_back(split: Split, tmp_path: Path) -> None:
    for kind, save in savers(split).items():
        save(tmp_path / kind)
    images, manifest = load_images(tmp_path / "images")
    np.testing.assert_array_equal(images.uint8(), split.train.uint8())
    assert isinstance(images.pixels, np.memmap)
    assert manifest.inputs == {"a": "b"}
    truth, _ = load_truth(tmp_path / "truth")
    assert truth.target_class == 1
    factors, _ = load_factors(tmp_path / "factors")
    expected = example_factors()
    assert list(factors.layers) == list(expected.layers)
    assert torch.equal(
        factors.layers["first"].lambda_matrix, expected.layers["first"].lambda_matrix
    )
    (queries, scores), _ = load_scores(tmp_path / "scores")
    assert queries.change.tolist() == [0, 1]
    assert scores.shape == (2, len(images))
    flags, _ = load_flags(tmp_path / "flags")
    assert flags.threshold == 0.5
    model = network()
    nn.init.zeros_(model[1].weight)
    load_weights(tmp_path / "model", model)
    assert torch.equal(model[1].weight, network()[1].weight)


def test_weights_that_do_not_fit_are_refused(split: Split, tmp_path: Path) -> None:
    savers(split)["model"](tmp_path / "model")
    with pytest.raises(ArtifactError, match="do not fit the model"):
        load_weights(tmp_path / "model", network(width=5))


def test_a_failed_save_leaves_the_old_artefact(split: Split, tmp_path: Path) -> None:
    digest = savers(split)["images"](tmp_path / "x")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_artifact(tmp_path / "x", "images", {"pixels.npy": fail})
    with pytest.raises(OSError, match="a directory"):
        write_text(tmp_path / "x", "text over a folder")
    assert open_artifact(tmp_path / "x", "images").digest == digest
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_a_kill_left_behind_is_removed(split: Split, tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    for name in (f".images.{gone}.abcdefgh", f".images.{os.getpid()}.abcdefgh.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pixels.npy").write_bytes(b"half")
    file = tmp_path / ".images.json.abc"  # of another record beside it
    file.write_bytes(b"half")
    savers(split)["images"](tmp_path / "images")
    assert {path.name for path in tmp_path.iterdir()} == {"images", file.name}


def test_what_another_process_writes_is_left_alone(split: Split, tmp_path: Path) -> None:
    others = {f".images.{os.getppid()}.abcdefgh", f".images.v2.{os.getpid()}.abcdefgh"}
    for name in others:
        (tmp_path / name).mkdir()
    savers(split)["images"](tmp_path / "images")
    assert {path.name for path in tmp_path.iterdir()} == {"images", *others}


def test_what_a_kill_left_without_a_place_is_kept_until_another_stands(
    split: Split, tmp_path: Path
) -> None:
    digest = savers(split)["images"](tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / f".x.{os.getpid()}.abcdefgh.old")

    def fail(path: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_artifact(tmp_path / "x", "images", {"pixels.npy": fail})
    assert open_artifact(tmp_path / "x", "images").digest == digest


def test_a_swap_that_fails_leaves_the_old_artefact(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = savers(split)["images"](tmp_path / "x")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == tmp_path / "x" and not self.name.endswith(".old"):
            raise OSError("no such luck")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no such luck"):
        savers(split)["images"](tmp_path / "x")
    assert open_artifact(tmp_path / "x", "images").digest == digest
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_flags_take_no_file_that_is_not_sealed(split: Split, tmp_path: Path) -> None:
    savers(split)["flags"](tmp_path / "flags")
    assert load_flags(tmp_path / "flags")[0].p_values is None
    np.save(tmp_path / "flags" / "p_values.npy", np.zeros(3))
    assert load_flags(tmp_path / "flags")[0].p_values is None


def test_artefacts_of_another_run_are_refused(split: Split, tmp_path: Path) -> None:
    savers(split)["images"](tmp_path / "x")
    manifest = open_artifact(tmp_path / "x", "images")
    require_input(manifest, "a", "b", owner=tmp_path)
    with pytest.raises(ArtifactError, match="computed from another a"):
        require_input(manifest, "a", "c", owner=tmp_path)


def test_missing_artefact_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="run: dvc repro"):
        open_artifact(tmp_path / "nothing", "images")
