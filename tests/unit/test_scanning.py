"""What a scan hands over to an investigation, and what it leaves in its folder."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from defense.errors import ArtifactError, DataError, DefenseError
from defense.evidence import FoundBlock, PointedInput, Scan
from defense.scanning import clear, hand_over, left_out, read_inputs, scan_home
from defense.storage import load_images, save_images, save_scan
from tests.conftest import make_images
from tests.unit.homes import exit_code

ROOT = Path(__file__).parents[2]


def block(label: int, p_value: float, *, suspected: bool = True) -> FoundBlock:
    rows = np.arange(40) < 10
    return FoundBlock(
        label, rows, 0.3, 0.1, (0.0, 0.0, 1.0), 0.0, 0.9, 100, 0, 1.0, p_value, suspected
    )


def pointed(place: int, number: int, *, dictated: bool = True) -> PointedInput:
    return PointedInput(f"i{place}", place, number, 0.01, dictated)


def handed(tmp_path: Path, *blocks: FoundBlock, inputs: tuple[PointedInput, ...]):
    train, images = make_images(40, seed=1), make_images(20, seed=2)
    subject = SimpleNamespace(train=train, origin={"suspect": "0" * 64})
    predicted = (images.labels + 1) % 4
    hand_over(Scan(blocks, inputs, 0.01), images, predicted, subject, tmp_path)
    if not (tmp_path / "affected").exists():
        return None
    affected, manifest = load_images(tmp_path / "affected")
    assert manifest.inputs["suspect"] == "0" * 64
    places = [images.ids.tolist().index(name) for name in affected.ids]
    np.testing.assert_array_equal(affected.labels, predicted[places])
    return places


def test_inputs_of_the_block_that_is_contradicted_most_surely_are_handed_over(tmp_path) -> None:
    blocks = block(1, 1e-3), block(2, 1e-9), block(3, 1e-12, suspected=False), block(0, 1e-15)
    inputs = (
        pointed(0, 0), pointed(1, 1), pointed(2, 1, dictated=False), pointed(5, 1), pointed(3, 2),
        pointed(4, 3, dictated=False),
    )  # fmt: skip
    assert handed(tmp_path, *blocks, inputs=inputs) == [1, 5]


def test_without_a_suspected_block_that_dictates_an_input_nothing_is_handed_over(tmp_path) -> None:
    natural = block(1, 1e-3, suspected=False), block(2, 1e-9)
    inputs = pointed(0, 0), pointed(1, 1, dictated=False)
    assert handed(tmp_path, *natural, inputs=inputs) is None


def test_what_an_earlier_scan_left_is_removed(tmp_path: Path) -> None:
    for name in ("affected", "scan"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    for name in (
        "block_0.png",
        "block_12.png",
        "labels.csv",
        "blocks.csv",
        "scan.json",
        "mine.png",
    ):
        (tmp_path / name).write_text("")
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


def test_a_scan_that_cannot_start_leaves_what_was_found(tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    save_images(tmp_path / "scan" / "affected", make_images(8, seed=2), inputs={})
    (tmp_path / "scan" / "scan.json").write_text("{}")
    save_scan(tmp_path / "scan" / "scan", Scan((), (), 0.01))
    with pytest.raises(ArtifactError, match="expected an artefact at"):
        scan_home(tmp_path, None, tmp_path / "scan")
    assert load_images(tmp_path / "scan" / "affected")[0].ids.shape == (8,)
    assert (tmp_path / "scan" / "scan.json").is_file()


@pytest.mark.parametrize(
    ("out", "inputs"),
    [
        ("scan", "scan/affected"),
        ("scan", "scan/scan/pictures"),
        ("artifacts", None),
        ("artifacts/more", None),
        ("week/scan", "week"),
        ("week", "week"),
    ],
)
def test_what_is_read_is_not_written_to(tmp_path: Path, out: str, inputs: str | None) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    with pytest.raises(DefenseError, match=r"would replace what .* name another folder"):
        scan_home(tmp_path, None if inputs is None else tmp_path / inputs, tmp_path / out)


@pytest.mark.parametrize("name", ["affected", "scan", "labels.csv", "block_a.png"])
def test_what_is_no_scans_is_not_replaced(tmp_path: Path, name: str) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(DefenseError, match="expected a new folder to write to"):
        scan_home(tmp_path, None, tmp_path / "out")


def test_artefacts_of_another_pipeline_are_not_replaced(tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    other = tmp_path / "other" / "artifacts"
    save_scan(other / "scan", Scan((), (), 0.01))
    (other / "suspect").mkdir()
    with pytest.raises(DefenseError, match="expected a new folder to write to"):
        scan_home(tmp_path, None, other)


@pytest.mark.parametrize(
    ("suspected", "unclear", "unchecked", "code"),
    [
        (True, True, (1,), 1),
        (False, True, (1,), 3),
        (False, True, (), 3),
        (False, False, (1,), 3),
        (False, False, (), 0),
    ],
)
def test_only_a_scan_that_decides_on_nothing_suspected_ends_well(
    monkeypatch, tmp_path: Path, suspected: bool, unclear: bool, unchecked: tuple[int], code: int
) -> None:
    found = replace(block(1, 1e-3, suspected=suspected), unclear=unclear)
    scan = Scan((found,), (), 0.01, unchecked)
    monkeypatch.setattr("defense.scanning.scan_home", lambda *_: (scan, []))
    assert exit_code("scan", "--home", str(tmp_path)) == code


def test_classes_that_were_not_looked_at_are_said() -> None:
    train = make_images(40, seed=1)
    assert left_out(Scan((), (), 0.01), train) == []
    lines = left_out(Scan((), (), 0.01, unchecked=(1,), in_part=(0, 2)), train)
    assert lines == ["not looked at: b", "not looked at as a whole: a, c"]
    (line,) = left_out(Scan((), (), 0.01), train, [3])
    assert line == "not looked at, because no input is predicted as it: d"


def test_inputs_of_another_size_are_refused(tmp_path: Path) -> None:
    train = make_images(40, seed=1)
    save_images(tmp_path / "same", make_images(8, seed=2), inputs={})
    save_images(tmp_path / "small", make_images(8, seed=2, shape=(1, 16, 16)), inputs={})
    assert len(read_inputs(tmp_path / "same", train)) == 8
    with pytest.raises(DataError, match="expected inputs of shape"):
        read_inputs(tmp_path / "small", train)
