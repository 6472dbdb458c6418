"""The paper's tables: what is averaged, what is left out, and what is a dash."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import paper_cells, tables

MATRIX = yaml.safe_load((paper_cells.HOME / "params.yaml").read_text())


def quality(tpr: float) -> dict:
    return {"tpr": tpr, "precision": 0.5, "average_precision": 0.25}


def cell(name: str, *, success: float = 1.0, tpr: float = 0.9, accuracy: float = 0.8) -> dict:
    """A record of one attack and seed in which Delta-Influence and EU have run."""
    repair = {"psr": 0.01, "accuracy": accuracy, "gradient_samples": 2000, "seconds": 3.0}
    detectors = {"default": {"all": quality(1.0), "predicted_label": quality(tpr), "seconds": None}}
    return {
        "settings": paper_cells._key(MATRIX, name),
        "success": success,
        "before": {"psr": success, "accuracy": 0.85},
        "detectors": {
            key: value | {"settings": paper_cells._method_key(MATRIX, key)}
            for key, value in detectors.items()
        },
        "repairs": {
            key: repair | {"settings": paper_cells._method_key(MATRIX, key)}
            for key in ("default/eu", "truth/eu")
        },
    }


def row(text: str, *starts: str) -> list[str]:
    """Find the cells of the row that starts so."""
    for line in text.splitlines():
        cells = [part.strip() for part in line.strip("|").split("|")]
        if cells[: len(starts)] == list(starts):
            return cells[len(starts) :]
    raise AssertionError(f"no row {starts} in\n{text}")


def test_means_and_deviations_over_seeds() -> None:
    cells = {
        f"cifar10/{s}/badnets": cell("cifar10/0/badnets", tpr=t) for s, t in enumerate((0.8, 1.0))
    }
    found = row(tables.page(cells), "BadNet", tables.DETECTORS["default"])
    assert found[:3] == ["–"] * 3  # its own rule is the restricted one
    assert found[3] == "90.0 ± 14.1 (2)"
    assert found[6:8] == ["1.0 ± 0.0 (2)", "80.0 ± 0.0 (2)"]
    assert found[-2:] == ["–", "–"]


def test_an_attack_that_fails_counts_for_nothing_else() -> None:
    name = "cifar10/0/witches_brew"
    cells = {
        name: cell(name, success=1.0, tpr=0.2),
        "cifar10/1/witches_brew": cell(name, success=0.0, tpr=0.9),
    }
    page = tables.page(cells)
    assert row(page, "Witches' Brew", "2")[0] == "50.0 ± 70.7 (2)"
    assert row(page, "Witches' Brew", tables.DETECTORS["default"])[3] == "20.0 (1)"


def test_published_figures_stand_beside_their_own_attack_alone() -> None:
    cells = {f"cifar10/0/{attack}": cell(f"cifar10/0/{attack}") for attack in ("badnets", "smooth")}
    for record in cells.values():
        record["detectors"]["ekfac"] = record["detectors"]["ekfac_5"] = {
            "all": quality(0.5), "predicted_label": quality(0.5), "seconds": 1.0
        }  # fmt: skip
    page = tables.page(cells)
    assert row(page, "BadNet", tables.DETECTORS["ekfac"])[-1] == "2.8 / 67.1"
    assert row(page, "smooth trigger", tables.DETECTORS["ekfac"])[-1] == "2.9 / 100"
    assert row(page, "BadNet", tables.SEVERAL["ekfac_5"])[-1] == "–"  # of Imagenette


def test_collapse_is_judged_seed_by_seed() -> None:
    cells = {f"cifar10/{s}/badnets": cell("cifar10/0/badnets") for s in range(2)}
    cells["cifar10/1/badnets"]["repairs"]["default/eu"]["accuracy"] = 0.5
    assert "1 of 2" in row(tables.page(cells), "BadNet", "EU")


def test_records_of_other_parameters_are_dropped(tmp_path: Path) -> None:
    store = tmp_path / "paper.json"
    good, stale = cell("cifar10/0/badnets"), cell("cifar10/0/badnets")
    stale["settings"] = "other"
    good["repairs"]["default/cf"] = good["repairs"]["default/eu"]  # of other settings
    store.write_text(json.dumps({"cells": {
        "cifar10/0/badnets": good, "cifar10/1/badnets": stale, "mars/0/badnets": good,
    }}))  # fmt: skip
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(MATRIX))
    kept = paper_cells.gather(tmp_path, store)
    assert list(kept) == ["cifar10/0/badnets"]
    assert set(kept["cifar10/0/badnets"]["repairs"]) == {"default/eu", "truth/eu"}


def test_a_misspelt_figure_is_an_error() -> None:
    cells = {"cifar10/0/badnets": cell("cifar10/0/badnets")}
    with pytest.raises(KeyError):
        list(paper_cells.values(cells, "cifar10", "badnets", "detectors", "default", "all", "tbr"))


def test_the_page_is_filled_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tables -->\nold\n<!-- end of tables -->\nafter\n")
    tables.fill(page, "new")
    assert page.read_text() == "before\n<!-- tables -->\n\nnew\n<!-- end of tables -->\nafter\n"
