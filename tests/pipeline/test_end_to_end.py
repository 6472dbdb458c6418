"""The real pipeline: a fresh clone runs `dvc repro`, and all it leaves behind is right."""

import getpass
import json
import platform
import re
import shutil
import sys
from pathlib import Path

import yaml
from mlflow.tracking import MlflowClient
from PIL import Image

from defense.html import render
from defense.lineage import verify_lineage
from defense.report import read_report
from defense.scanning import UNFINISHED
from tests.pipeline.conftest import run, set_params, stage


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_defends(clone: Path) -> None:
    report = load(clone / "reports" / "audit.json")
    before, after = report["before"], report["after"]
    assert before["psr"]["value"] > 0.8
    assert before["affected_fooled"]["value"] == 1
    assert after["psr"]["value"] < 0.5 * before["psr"]["value"]
    assert after["clean_accuracy"]["value"] > 0.8
    last = report["confirmation"]["points"][-1]
    assert last["rows"] == report["num_flagged"]
    assert last["flagged"] < last["others"]
    restricted = report["detection"][0]
    assert restricted["rows"] == "predicted_label"
    assert restricted["tpr"]["value"] > 0.8
    # the affected input is not among the trials of the success rate
    assert before["psr"]["total"] == len(_probe_ids(clone)) - 1


def _probe_ids(clone: Path):
    from defense.storage import load_images

    return load_images(clone / "artifacts" / "probe")[0].ids


def test_gate_says_what_the_verdict_says(clone: Path) -> None:
    verdict = load(clone / "reports" / "verdict.json")
    done = run(clone, "defense", "gate")
    assert done.returncode == (0 if verdict["passed"] else 1)
    assert done.stdout.strip() == (clone / "reports" / "verdict.md").read_text().strip()


def test_a_scan_finds_the_poison_without_an_incident(clone: Path, tmp_path: Path) -> None:
    done = run(clone, "defense", "scan", "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stdout.strip().splitlines()[-1] == f"poison suspected, see {tmp_path}"
    assert (
        file_bytes(tmp_path / "scan")["rows.npy"]
        == (clone / "artifacts" / "scan" / "rows.npy").read_bytes()
    )
    (suspected,) = [b for b in load(clone / "reports" / "audit.json")["blocks"] if b["suspected"]]
    assert suspected["planted"]["value"] > 0.9
    assert suspected["planted"]["successes"] > 0.8 * 35  # of the poison
    listed = (tmp_path / "blocks.csv").read_text().splitlines()[1:]
    assert sum(line.split(",")[1] == "suspected" for line in listed) == suspected["num_rows"]
    assert not (tmp_path / UNFINISHED).exists()
    doubted = (tmp_path / "labels.csv").read_text()
    assert doubted == (clone / "reports" / "labels.csv").read_text()
    assert len(doubted.splitlines()) == 11


def test_a_scan_hands_inputs_over_to_an_investigation(clone: Path, tmp_path: Path) -> None:
    from defense.storage import load_images

    probe = load_images(clone / "artifacts" / "probe")[0]
    for name, pixels in zip(range(20), probe.uint8(slice(0, 20)), strict=True):
        (tmp_path / "week" / "day").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0]).save(tmp_path / "week" / "day" / f"{name:02}.png")
    out = tmp_path / "out"
    week = ("--inputs", str(tmp_path / "week"), "--out", str(out))
    done = run(clone, "defense", "scan", *week)
    assert done.returncode == 1, done.stderr
    affected = load_images(out / "affected")[0]
    assert set(affected.ids.tolist()) <= {f"day/{name:02}.png" for name in range(20)}
    assert len(affected) > 10
    target = yaml.safe_load((clone / "params.yaml").read_text())["attack"]["target_class"]
    assert {affected.class_names[label] for label in affected.labels} == {target}
    home = tmp_path / "home"
    shutil.copytree(clone, home, symlinks=True)
    shutil.rmtree(home / "artifacts" / "affected")
    shutil.copytree(out / "affected", home / "artifacts" / "affected")
    for name in ("influence", "detect", "confirm", "remediate", "audit"):
        done = stage(home, name)
        assert done.returncode == 0, done.stderr
    report = load(home / "reports" / "audit.json")
    assert {given["true"] for given in report["affected"]} == {None}
    before, after = (report[moment]["affected_fooled"] for moment in ("before", "after"))
    assert (before["value"], before["total"]) == (1, len(affected))
    assert after["value"] < 0.2
    assert "true class unknown" in (home / "reports" / "report.html").read_text()


def test_second_repro_does_nothing(clone: Path) -> None:
    lock = (clone / "dvc.lock").read_bytes()
    done = run(clone, sys.executable, "-m", "dvc", "repro")
    assert done.returncode == 0
    assert "Data and pipelines are up to date" in done.stdout + done.stderr
    assert (clone / "dvc.lock").read_bytes() == lock
    status = run(clone, sys.executable, "-m", "dvc", "status", "--json", "dvc.yaml")
    assert json.loads(status.stdout) == {}


def test_metrics_and_plots_are_dvcs(clone: Path) -> None:
    shown = run(clone, sys.executable, "-m", "dvc", "metrics", "show", "--json")
    metrics = json.loads(shown.stdout)[""]["data"]
    assert metrics["metrics/audit.json"]["data"]["after"]["psr"] is not None
    declared = yaml.safe_load((clone / "dvc.yaml").read_text())["stages"]["audit"]["plots"]
    assert list(declared[0]) == ["reports/plots"]
    pictures = sorted((clone / "reports" / "plots").glob("*.png"))
    assert len(pictures) == 8 + len(load(clone / "reports" / "audit.json")["blocks"])
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.width > 300
            assert len(image.convert("RGB").getcolors(10**6)) > 10


def test_report_opens_offline(clone: Path) -> None:
    text = (clone / "reports" / "report.html").read_text()
    blocks = load(clone / "reports" / "audit.json")["blocks"]
    assert text.count("data:image/png;base64,") == 8 + len(blocks)
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert "<script" not in text
    for evidence in load(clone / "reports" / "audit.json")["artifacts"].values():
        assert evidence["sha256"] in text


def test_advice_about_labels_is_on_the_page_if_there_is_any(clone: Path) -> None:
    report = read_report(clone / "reports" / "audit.json")
    pictures = file_bytes(clone / "reports" / "plots")
    assert "look among all rows" not in render(report, pictures)
    first, *others = report.incidents
    advised = [first.model_copy(update={"rival": "7"}), *others]
    page = render(report.model_copy(update={"incidents": advised}), pictures)
    assert "<strong>7 is not the predicted label: look among all rows" in page


def test_a_cause_that_no_row_gives_away_is_told_on_the_page(clone: Path) -> None:
    report = read_report(clone / "reports" / "audit.json")
    pictures = file_bytes(clone / "reports" / "plots")
    assert "no row of it stands out" not in render(report, pictures)
    first, *others = report.incidents
    untold = [first.model_copy(update={"untold": True, "num_flagged": 0}), *others]
    page = render(report.model_copy(update={"incidents": untold}), pictures)
    assert "more than chance, but no row of it stands out" in page


def test_what_could_not_be_judged_is_told_on_the_page(clone: Path) -> None:
    report = read_report(clone / "reports" / "audit.json")
    pictures = file_bytes(clone / "reports" / "plots")
    unknown = report.incidents[0].model_copy(update={"p_value": None, "num_flagged": 0})
    page = render(report.model_copy(update={"incidents": [unknown]}), pictures)
    assert "<strong>not investigated</strong>, for lack of clean inputs" in page
    hit = report.incidents[0].model_copy(update={"alike": ["test/7.png"]})
    page = render(report.model_copy(update={"incidents": [hit]}), pictures)
    assert "Left out of the comparison" in page
    assert "test/7.png: look for the trigger in them" in page
    unclear = report.blocks[0].model_copy(update={"suspected": False, "unclear": True})
    page = render(report.model_copy(update={"blocks": [unclear]}), pictures)
    assert "<strong>unclear</strong>: natural rows that are hard, or wrong labels" in page


def test_counterfactuals_tell_the_cause_from_other_rows(home: Path) -> None:
    done = stage(home, "counterfactual")
    assert done.returncode == 0, done.stderr
    found = load(home / "metrics" / "counterfactual.json")
    rates = {
        name: [model["psr"]["value"] for model in entry["trainings"]]
        for name, entry in found.items()
    }
    assert all(len(values) == 3 for values in rates.values())
    assert found["nothing"]["removed"] == 0
    assert found["clean"]["removed"] == found["found"]["removed"] > 20
    assert max(rates["found"]) < min(rates["clean"])


def test_stages_repeat_themselves_to_the_byte(home: Path) -> None:
    """The promise of a lineage: the same inputs give the same digest."""
    outs = (
        "suspect",
        "affected",
        "factors",
        "directions",
        "scan",
        "doubts",
        "scores",
        "flags",
        "confirmation",
        "remediated",
    )
    folders = [home / "artifacts" / name for name in outs]
    folders.append(home / "reports")
    before = [file_bytes(folder) for folder in folders]
    left_by_a_kill = home / "scratch" / "train" / "old.pt"
    left_by_a_kill.parent.mkdir(parents=True)
    left_by_a_kill.touch()
    stages = "train factors directions scan influence detect confirm remediate audit gate"
    for name in stages.split():
        done = stage(home, name)
        assert done.returncode == 0
        assert len(done.stdout.strip().splitlines()) == 1  # what it tells the user
    for folder, old in zip(folders, before, strict=True):
        assert file_bytes(folder) == old, folder
    assert not list((home / "scratch").iterdir())  # results are written, checkpoints go


def test_lineage_links_data_to_verdict(clone: Path, home: Path) -> None:
    assert verify_lineage(clone) == []
    nodes = load(clone / "reports" / "lineage.json")["nodes"]
    names = {node["sha256"]: name for name, node in nodes.items()}
    reached, todo = set(), ["verdict"]
    while todo:
        name = todo.pop()
        reached.add(name)
        todo += [names[sha] for sha in nodes[name]["inputs"].values() if names[sha] not in reached]
    assert reached == set(nodes) - {"page", "flagged_rows"}  # shown to people, not judged
    for name in ("artifacts/clean_train/labels.npy", "reports/flags.csv"):
        file = home / name
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        done = run(home, "defense", "lineage", "verify")
        assert done.returncode == 3
        assert (
            name in done.stderr or Path(name).stem in done.stderr or "flagged_rows" in done.stderr
        )


def client(home: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{home}/mlflow.db")


def runs_of(store: MlflowClient, name: str = "delta-defense"):
    experiment = store.get_experiment_by_name(name)
    return store.search_runs([experiment.experiment_id])


def test_mlflow_records_read_back(clone: Path) -> None:
    store = client(clone)
    runs = {run.data.tags["mlflow.runName"]: run for run in runs_of(store)}
    report = load(clone / "reports" / "audit.json")
    digest = load(clone / "reports" / "lineage.json")["digest"]
    parent = runs.pop(f"pipeline {digest[:8]}")
    assert set(runs) == {"before", "after"}
    for part, child in runs.items():
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.metrics["psr"] == report[part]["psr"]["value"]
        assert child.data.metrics["clean_accuracy"] == report[part]["clean_accuracy"]["value"]
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["lineage.digest"] == digest
    commit = run(clone, "git", "rev-parse", "HEAD").stdout.strip()
    assert parent.data.tags["mlflow.source.git.commit"] == commit
    assert parent.data.tags["git.dirty"] == "true"  # the parameters were cut down
    assert parent.data.tags["mlflow.user"] == getpass.getuser()
    assert parent.data.tags["python"] == platform.python_version()
    assert parent.data.params["train.epochs"] == str(report["methods"]["train"]["epochs"])
    names = {file.path for file in store.list_artifacts(parent.info.run_id)}
    assert {"audit.json", "report.html", "verdict.json", "lineage.json"} <= names


def test_mlflow_inputs_carry_both_hashes(clone: Path) -> None:
    store = client(clone)
    nodes = load(clone / "reports" / "lineage.json")["nodes"]
    stages = yaml.safe_load((clone / "dvc.lock").read_text())["stages"]
    md5 = {out["path"]: out["md5"] for s in stages.values() for out in s["outs"]}
    parent = next(r for r in runs_of(store) if r.data.tags["defense.part"] == "pipeline")
    inputs = parent.inputs.dataset_inputs
    assert {entry.dataset.name for entry in inputs} == {
        "clean_train",
        "poisoned_train",
        "test",
        "probe",
    }
    for entry in inputs:
        tags = {tag.key: tag.value for tag in entry.tags}
        node = nodes[entry.dataset.name]
        assert tags["sha256"] == node["sha256"]
        assert entry.dataset.digest == md5[node["path"]]


def test_tracking_twice_adds_nothing_and_mends_a_torn_run(home: Path) -> None:
    record = (home / "reports" / "tracked.json").read_bytes()
    (home / "mlflow.db").unlink()
    assert stage(home, "track").returncode == 0
    store = client(home)
    first = {run.info.run_id for run in runs_of(store)}
    assert len(first) == 3
    assert stage(home, "track").returncode == 0
    assert {run.info.run_id for run in runs_of(store)} == first
    assert (home / "reports" / "tracked.json").read_bytes() == record
    parent = next(
        r for r in runs_of(store) if r.data.tags["defense.part"] == "pipeline"
    ).info.run_id
    store.update_run(parent, status="RUNNING")  # as a kill would leave it
    assert stage(home, "track").returncode == 0
    again = runs_of(store)
    assert len(again) == 3
    assert parent not in {run.info.run_id for run in again}


def test_a_clean_tree_is_recorded_as_clean(home: Path) -> None:
    git = ("git", "-c", "user.name=Test", "-c", "user.email=test@example.org")
    assert run(home, *git, "commit", "-qam", "cut down").returncode == 0
    (home / "mlflow.db").unlink()
    assert stage(home, "track").returncode == 0
    parent = next(r for r in runs_of(client(home)) if r.data.tags["defense.part"] == "pipeline")
    assert parent.data.tags["git.dirty"] == "false"


def test_tracking_goes_where_the_environment_says(home: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/other.db"
    set_params(home, lambda params: params["tracking"].update(experiment="elsewhere"))
    assert stage(home, "track", MLFLOW_TRACKING_URI=uri).returncode == 0
    assert len(runs_of(MlflowClient(uri), "elsewhere")) == 3
    assert client(home).get_experiment_by_name("elsewhere") is None


def test_a_tracking_server_that_does_not_answer_is_one_line(home: Path) -> None:
    once = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}
    done = stage(home, "track", MLFLOW_TRACKING_URI="http://127.0.0.1:9", **once)
    assert done.returncode == 2
    assert "error: track: MLflow at http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr
