"""params.yaml: all of it is validated before any stage computes."""

from pathlib import Path

import pytest
import yaml

from defense.errors import DefenseError
from pipelines.params import read_params

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", [ROOT, ROOT / "pipelines" / "cifar10"])
def test_the_shipped_files_are_valid(folder: Path) -> None:
    assert read_params(folder / "params.yaml").affected.count == 1


def change(tmp_path: Path, path: str, value: object) -> Path:
    """Write the root params with one value changed."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    *sections, key = path.split(".")
    place = params
    for section in sections:
        place = place[section]
    place[key] = value
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(params))
    return file


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sead", 1, "sead: Extra inputs are not permitted"),
        ("train.epoch", 3, "train.epoch: Extra inputs"),
        ("train.epochs", 0, "train.epochs: Input should be greater than 0"),
        ("train.learning_rate", float("nan"), "train.learning_rate"),
        ("detector.name", "magic", "does not match any of the expected tags"),
        ("detector.alarm", 3.0, "less than 1"),
        ("directions.leading", [128, 0], "directions.leading.1: Input should be greater than 0"),
        ("attack.poison_fraction", 1.5, "less than 1"),
        ("unlearner", {"name": "cf", "budget": 1.5}, "less than or equal to 1"),
        (
            "detector",
            {"name": "influence_threshold", "affected_tolerance": 1},
            "affected_tolerance has no meaning for a mean",
        ),
        (
            "detector",
            {"name": "spectral_signatures", "share": 0.2},
            "variant tran has no use for share",
        ),
        (
            "detector",
            {"name": "spectral_signatures", "variant": "paper", "centred": False},
            "variant paper has no use for centred",
        ),
        ("gate.max_psr", "low", "gate.max_psr: Input should be a valid number"),
        ("data", None, "data: "),
    ],
)
def test_refuses_in_one_line(tmp_path: Path, path: str, value: object, message: str) -> None:
    with pytest.raises(DefenseError, match=message) as caught:
        read_params(change(tmp_path, path, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1", "- 1", "seed: 1"])
def test_refuses_what_is_not_a_params_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(DefenseError, match=r"params\.yaml") as caught:
        read_params(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)


def test_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DefenseError, match="expected parameters in"):
        read_params(tmp_path / "params.yaml")
