"""The detection benchmark on a toy: everything that has a table is measured."""

import json
from pathlib import Path

import pytest

from benchmarks import suspects
from benchmarks.detection import measured
from benchmarks.detection_page import page
from defense.attacks.badnets import BadNets
from defense.datasets.digits import Digits
from defense.models.small_cnn import SmallCnn
from defense.recipe import Recipe

TABLES = (
    "One affected input",
    "False discoveries",
    "A class as a whole",
    "After removal",
    "Scan of the training set alone",
    "Scan from untriggered inputs",
    "Wrong labels",
    "Cost in epochs",
)


def test_all_tables_are_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(epochs=12, batch_size=64, learning_rate=0.05)
    attack = BadNets(victim_class="8", target_class="3", pattern="square", poison_fraction=0.04)
    world = suspects.World(Digits(), recipe, SmallCnn())
    monkeypatch.setitem(suspects.ATTACKS, "badnets_1", (world, (attack,)))
    monkeypatch.setitem(suspects.FLIPS, "badnets_1", 0.03)
    measured("badnets_1", 7, tmp_path, repair=False, alone=True)
    (file,) = tmp_path.glob("*.json")
    before = json.loads(file.read_text())
    assert "repair" not in before
    measured("badnets_1", 7, tmp_path, repair=True)
    facts = json.loads(file.read_text())
    assert {key: facts[key] for key in before} == before
    assert facts["labels"]["doubt"] > 0.3  # 0.03 by chance
    assert facts["psr"][0] > 0.8
    assert facts["scan"]["tpr"] is not None
    text = page({file.stem: facts})
    assert [title for title in TABLES if f"### {title}\n" in text] == [*TABLES]
