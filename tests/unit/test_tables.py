"""The paper's tables: what is averaged, what is left out, and what is a dash."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import detection_page, detection_rows, paper_cells, tables


def quality(tpr: float) -> dict:
    return {"tpr": tpr, "precision": 0.5, "average_precision": 0.25}


def settings(name: str, stage: str) -> str | None:
    return paper_cells._settings(paper_cells.HOME, name, stage)


def found(name: str, detector: str, *, tpr: float = 0.9, cpu_seconds: float | None = None) -> dict:
    """A record of a detector."""
    return {
        "all": quality(1.0),
        "predicted_label": quality(tpr),
        "cpu_seconds": cpu_seconds,
        "all_flagged": False,
        "settings": settings(f"{name}/{detector}", paper_cells._stage(detector)),
    }


def cell(name: str, *, success: float = 1.0, tpr: float = 0.9, accuracy: float = 0.8) -> dict:
    """A record of one attack and seed in which Delta-Influence and EU have run."""
    repair = {"psr": 0.01, "accuracy": accuracy, "robust_accuracy": 0.7, "gradient_samples": 2000,
              "seconds": 3.0}  # fmt: skip
    detectors = {key: found(name, key, tpr=tpr) for key in ("normalised", "truth")}
    return {
        "settings": settings(name, "influence"),
        "hardware": {"device": "cpu"},
        "success": success,
        "share": {"all": 0.03, "predicted_label": 0.25},
        "cpu_seconds": {"factors": 20.0, "influence": 10.0},
        "before": {"psr": success, "accuracy": 0.85, "robust_accuracy": 0.1},
        "detectors": detectors,
        "repairs": {
            key: repair | {"settings": settings(f"{name}/{key}", "remediate")}
            for key in ("normalised/eu", "truth/eu")
        },
    }


def alone(cells: dict[str, dict]) -> paper_cells.Cells:
    """Give every cell a single suspect."""
    return {name: {"suspect": record} for name, record in cells.items()}


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
    shown = row(tables.page(alone(cells)), "BadNet", tables.DETECTORS["normalised"])
    assert shown[:3] == ["–"] * 3  # its own rule is the restricted one
    assert shown[3] == "90.0 ± 14.1 (2)"
    assert shown[6:8] == ["1.0 ± 0.0 (2)", "80.0 ± 0.0 (2)"]
    assert shown[-2:] == ["–", "–"]


def test_every_detector_stands_beside_what_flagging_every_row_gives() -> None:
    shown = row(
        tables.page(alone({"cifar10/0/badnets": cell("cifar10/0/badnets")})), "BadNet", "every row"
    )
    assert shown[:6] == ["100", "3.0 (1)", "–", "100", "25.0 (1)", "–"]


def test_detectors_pay_for_the_scores_they_need() -> None:
    name = "cifar10/0/badnets"
    cells = {name: cell(name)}
    for detector in ("ekfac", "frequency"):
        cells[name]["detectors"][detector] = found(name, detector, cpu_seconds=1.0)
    page = tables.page(alone(cells))
    assert row(page, "BadNet", tables.DETECTORS["ekfac"])[-2] == "31.0 (1)"
    assert row(page, "BadNet", tables.DETECTORS["frequency"])[-2] == "1.0 (1)"


def test_flagging_every_row_is_told() -> None:
    name = "cifar10/0/badnets"
    cells = {name: cell(name)}
    cells[name]["detectors"]["ekfac"] = found(name, "ekfac") | {"all_flagged": True}
    shown = row(tables.page(alone(cells)), "BadNet", tables.DETECTORS["ekfac"])
    assert shown[6] == "–; nothing left on 1"


def test_an_attack_that_fails_counts_for_nothing_else() -> None:
    name = "cifar10/0/witches_brew"
    cells = {
        name: cell(name, success=1.0, tpr=0.2),
        "cifar10/1/witches_brew": cell(name, success=0.0, tpr=0.9),
    }
    page = tables.page(alone(cells))
    assert row(page, "Witches' Brew", "2")[0] == "1 of 2"
    assert row(page, "Witches' Brew", tables.DETECTORS["normalised"])[3] == "20.0 (1)"


def test_published_figures_stand_beside_their_own_attack_alone() -> None:
    cells = {f"cifar10/0/{attack}": cell(f"cifar10/0/{attack}") for attack in ("badnets", "smooth")}
    for name, record in cells.items():
        for detector in ("ekfac", "ekfac_5"):
            record["detectors"][detector] = found(name, detector, cpu_seconds=1.0)
    page = tables.page(alone(cells))
    assert row(page, "BadNet", tables.DETECTORS["ekfac"])[-1] == "2.8 / 67.1"
    assert row(page, "smooth trigger", tables.DETECTORS["ekfac"])[-1] == "2.9 / 100"
    assert row(page, "BadNet", tables.SEVERAL["ekfac_5"])[-1] == "–"  # of Imagenette


def test_collapse_is_judged_seed_by_seed() -> None:
    cells = {f"cifar10/{s}/badnets": cell("cifar10/0/badnets") for s in range(2)}
    cells["cifar10/1/badnets"]["repairs"]["normalised/eu"]["accuracy"] = 0.5
    assert "1 of 2" in row(tables.page(alone(cells)), "BadNet", "EU")
    cells["cifar10/0/badnets"]["repairs"]["normalised/eu"]["psr"] = 0.2
    page = tables.page(alone(cells))
    assert "0 of 2" in row(page, "BadNet", "EU")
    assert row(page, "BadNet", "before")[:3] == [
        "100.0 ± 0.0 (2)",
        "85.0 ± 0.0 (2)",
        "10.0 ± 0.0 (2)",
    ]


def test_counterfactuals_count_trainings() -> None:
    name = "cifar10/0/witches_brew"
    cells = {name: cell(name)}
    cells[name]["detectors"]["normalised"]["counterfactual"] = {
        part: {"removed": 7, "psr": [1.0, 0.0, 1.0], "accuracy": [0.7, 0.8, 0.9]}
        for part in tables.COUNTERFACTUALS
    }
    shown = row(tables.page(alone(cells)), "poison that is not flagged")
    assert shown == ["100", "7.0 (1)", "2 of 3", "80.0 ± 10.0 (3)"]


def test_records_of_other_parameters_are_dropped(tmp_path: Path) -> None:
    store = tmp_path / "paper.json"
    good, stale = cell("cifar10/0/badnets"), cell("cifar10/0/badnets")
    stale["settings"] = "other"
    good["repairs"]["normalised/cf"] = good["repairs"]["normalised/eu"]  # of other settings
    good["detectors"]["zap"] = good["detectors"]["normalised"]  # gone
    good["repairs"]["delta_restricted/cf"] = good["repairs"]["normalised/eu"] | {
        "settings": settings("cifar10/0/badnets/delta_restricted/cf", "remediate")
    }  # in no list of the matrix
    store.write_text(json.dumps({"cells": alone({
        "cifar10/0/badnets": good, "cifar10/1/badnets": stale, "mars/0/badnets": good,
    })}))  # fmt: skip
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(paper_cells.HOME / name, tmp_path)
    kept = paper_cells.gather(tmp_path, store)
    assert list(kept) == ["cifar10/0/badnets"]
    [record] = kept["cifar10/0/badnets"].values()
    assert set(record["repairs"]) == {"normalised/eu", "truth/eu"}
    assert set(record["detectors"]) == {"normalised", "truth"}


def test_what_is_of_another_model_is_marked_and_measured_on_that_model() -> None:
    name = "cifar10/0/badnets"
    first, second = cell(name, tpr=0.5), cell(name, success=0.7, tpr=0.9)
    first["detectors"]["ekfac"] = found(name, "ekfac", tpr=0.4)
    del first["detectors"]["normalised"], first["repairs"]["normalised/eu"]
    first["repairs"]["nothing/eu"] = first["repairs"]["truth/eu"]
    second["detectors"]["ekfac"] = found(name, "ekfac", tpr=0.1)
    second["repairs"]["ekfac/eu"] = second["repairs"]["normalised/eu"]
    second["detectors"].pop("truth"), second["repairs"].pop("truth/eu")
    first["detectors"]["nothing"] = first["detectors"]["truth"]
    page = tables.page({name: {"one": second, "other": first}})
    assert row(page, "BadNet", tables.DETECTORS["ekfac"])[3] == "40.0 (1)"
    assert row(page, "BadNet", tables.DETECTORS["ekfac"])[6] == "–"  # EU ran on the other model
    assert row(page, "BadNet", tables.DETECTORS["normalised"] + tables.OTHER)[3] == "90.0 (1)"
    assert row(page, "BadNet" + tables.OTHER, "1")[0] == "70.0 (1)"
    assert row(page, "BadNet", "before" + tables.OTHER)[0] == "70.0 (1)"
    assert page.count(tables.NOTE) == 3


def test_seeds_of_a_mean_are_of_one_device_where_they_can_be() -> None:
    names = [f"cifar10/{seed}/badnets" for seed in range(3)]
    here = {"hardware": {"device": "cpu"}}
    suspects = {name: {"there": cell(name, tpr=0.9) | {"hardware": {"device": "H200"}}}
                for name in names}  # fmt: skip
    more = cell(names[1], tpr=0.1) | here
    more["detectors"]["ekfac"] = found(names[1], "ekfac", tpr=0.4)
    suspects[names[1]]["here"] = more
    page = tables.page(suspects)
    assert row(page, "BadNet", tables.DETECTORS["normalised"] + tables.OTHER)[3] == "90.0 ± 0.0 (3)"
    assert row(page, "BadNet", tables.DETECTORS["ekfac"])[3] == "40.0 (1)"


def test_a_misspelt_figure_is_an_error() -> None:
    cells = {"cifar10/0/badnets": cell("cifar10/0/badnets")}
    with pytest.raises(KeyError):
        list(
            paper_cells.values(
                alone(cells), "cifar10", "badnets", "detectors", "normalised", "all", "tbr"
            )
        )


def test_the_page_is_filled_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tables -->\nold\n<!-- end of tables -->\nafter\n")
    tables.fill(page, "new")
    assert page.read_text() == "before\n<!-- tables -->\n\nnew\n<!-- end of tables -->\nafter\n"


def test_models_of_an_earlier_detector_have_rows_of_their_own() -> None:
    """Versions are never averaged, and rows without cells are left out."""
    old = {"attack": "badnets_1", "seed": 3, "seconds": 1}
    models = {
        "badnets_1-3": old,
        "badnets_1-2-v3": {"attack": "badnets_1", "seed": 2, "version": 3},
        "sig_1-4-v2": old | {"attack": "sig_1", "seed": 4, "version": 2},
    }
    rows = detection_rows.each(models, lambda found: [str(model["seed"]) for model in found])
    assert rows == [["BadNet 1 %", "2"], ["BadNet 1 % ††", "3"], ["SIG 1 % †", "4"]]
    timed = detection_rows.each(models, lambda found: ["t" for m in found if "seconds" in m])
    assert timed == [["BadNet 1 % ††", "t"], ["SIG 1 % †", "t"]]


@pytest.mark.parametrize(("count", "shown"), [(2, ["34", "2"]), (3, ["345"])])
def test_rows_of_an_earlier_detector_end_where_a_later_one_has_enough(
    count: int, shown: list[str]
) -> None:
    """Only models count that were asked."""
    models = {"old": {"attack": "badnets_1", "seed": 2, "asked": True}}
    for seed in (3, 4, 5, 6):
        asked = seed < 3 + count
        models[f"{seed}-v3"] = {"attack": "badnets_1", "seed": seed, "version": 3, "asked": asked}
    rows = detection_rows.each(
        models,
        lambda found: (
            [name] if (name := "".join(str(m["seed"]) for m in found if m["asked"])) else []
        ),
    )
    assert [row[1] for row in rows] == shown


def test_a_page_of_nothing_has_no_tables() -> None:
    assert detection_page.page({}) == ""


def shown(path: Path) -> str:
    """Read the tables of a page."""
    text = path.read_text(encoding="utf-8")
    return text.split("<!-- tables -->\n")[1].split("<!-- end of tables -->")[0].strip()


def test_the_pages_show_what_is_on_record() -> None:
    docs, results = tables.ROOT / "docs", tables.ROOT / "benchmarks" / "results"
    cells = json.loads((results / "paper.json").read_text())["cells"]
    assert shown(docs / "paper.md") == tables.page(cells).strip()
    models = json.loads((results / "detection.json").read_text())["models"]
    assert shown(docs / "detection.md") == detection_page.page(models).strip()


def test_what_is_on_record_was_made_under_the_parameters_of_today(tmp_path: Path) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(tables.ROOT / "pipelines" / "paper" / name, tmp_path)
    kept = tables.ROOT / "benchmarks" / "results" / "paper.json"
    assert paper_cells.gather(tmp_path, kept) == json.loads(kept.read_text())["cells"]
