"""Record a run in MLflow. The only module that imports mlflow."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from defense.errors import DefenseError
from defense.machine import git_state, hardware, user
from defense.report import AuditReport, ModelQuality

DIGEST_TAG = "lineage.digest"
PART_TAG = "defense.part"
MAX_DIGEST = 36  # MLflow refuses longer data-set digests
DATASETS = ("clean_train", "poisoned_train", "test", "probe")


@dataclass(frozen=True)
class Recorded:
    """What is recorded: the folder, its report, its lineage and whether the gate passed."""

    home: Path
    report: AuditReport
    lineage: dict[str, Any]
    passed: bool


def track(recorded: Recorded, experiment_name: str) -> str:
    """Record one parent run per lineage digest with nested runs ``before`` and ``after``.

    A lineage that is already recorded is left as it is, and a run that was cut short is
    removed and written again.

    Args:
        recorded: What is recorded.
        experiment_name: The MLflow experiment, made if it does not exist.

    Returns:
        The id of the parent run.

    Raises:
        DefenseError: The tracking server cannot be reached or refuses.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{recorded.home.resolve()}/mlflow.db"
    try:
        return _track(recorded, experiment_name, uri)
    except MlflowException as error:
        reason = " ".join(str(error).split())[:300]
        raise DefenseError(f"MLflow at {uri}: {reason}; check MLFLOW_TRACKING_URI") from error


def _track(recorded: Recorded, experiment_name: str, uri: str) -> str:
    client = MlflowClient(uri)
    experiment = _experiment(client, experiment_name, recorded.home, uri)
    digest = recorded.lineage["digest"]
    found: str | None = None
    for run in _runs(client, experiment, digest):
        if run.info.status == "FINISHED" and found is None:
            found = run.info.run_id
        else:
            _remove(client, experiment, run.info.run_id)
    return found or _record(client, experiment, recorded)


def _experiment(client: MlflowClient, name: str, home: Path, uri: str) -> str:
    """Find or make the experiment; with the local database, artefacts lie next to it."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    local = uri.startswith("sqlite:")
    place = (home / "mlartifacts").resolve().as_uri() if local else None
    return str(client.create_experiment(name, artifact_location=place))


def _runs(client: MlflowClient, experiment: str, digest: str) -> list[Run]:
    query = f"tags.`{DIGEST_TAG}` = '{digest}' and tags.`{PART_TAG}` = 'pipeline'"
    return list(client.search_runs([experiment], query, order_by=["attribute.start_time ASC"]))


def _remove(client: MlflowClient, experiment: str, parent: str) -> None:
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    for run_id in [*(child.info.run_id for child in children), parent]:
        client.delete_run(run_id)


def _record(client: MlflowClient, experiment: str, recorded: Recorded) -> str:
    """Write the parent run and its two children; the parent is finished last."""
    report = recorded.report
    digest = recorded.lineage["digest"]
    tags = {DIGEST_TAG: digest, PART_TAG: "pipeline", "gate.passed": str(recorded.passed).lower()}
    tags |= git_tags(recorded.home) | machine_tags()
    parent = client.create_run(experiment, tags=tags, run_name=f"pipeline {digest[:8]}")
    run_id: str = parent.info.run_id
    for part, quality in (("before", report.before), ("after", report.after)):
        tags = {DIGEST_TAG: digest, PART_TAG: part, "mlflow.parentRunId": run_id}
        child = client.create_run(experiment, tags=tags, run_name=part).info.run_id
        for name, value in _rates(quality).items():
            client.log_metric(child, name, value)
        client.set_terminated(child)
    for name, setting in _params(report).items():
        client.log_param(run_id, name, setting)
    for name, value in _summary(recorded).items():
        client.log_metric(run_id, name, value)
    _log_inputs(client, run_id, recorded)
    for path in _artifacts(recorded.home):
        client.log_artifact(run_id, str(path))
    client.set_terminated(run_id)
    return run_id


def _rates(quality: ModelQuality) -> dict[str, float]:
    fields = type(quality).model_fields
    rates = {name: getattr(quality, name).value for name in fields}
    return {name: value for name, value in rates.items() if value is not None}


def _summary(recorded: Recorded) -> dict[str, float]:
    """Headline figures of the parent run."""
    report = recorded.report
    figures = {f"before.{name}": value for name, value in _rates(report.before).items()}
    figures |= {f"after.{name}": value for name, value in _rates(report.after).items()}
    for entry in report.detection:
        shares = {"tpr": entry.tpr.value, "precision": entry.precision.value}
        shares["average_precision"] = entry.average_precision
        figures |= {
            f"detection.{entry.rows}.{name}": share
            for name, share in shares.items()
            if share is not None
        }
    return figures | {"num_flagged": report.num_flagged, "gate.passed": float(recorded.passed)}


def _params(report: AuditReport) -> dict[str, str]:
    """Flatten the settings one level: ``train.epochs``."""
    flat: dict[str, str] = {}
    for section, values in report.methods.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": str(value) for key, value in values.items()}
        else:
            flat[section] = str(values)
    return flat


def _log_inputs(client: MlflowClient, run_id: str, recorded: Recorded) -> None:
    """Log every image set with its DVC md5 as digest and the sha256 of its manifest as tag."""
    hashes = dvc_md5s(recorded.home / "dvc.lock")
    inputs = []
    for name in DATASETS:
        node = recorded.lineage["nodes"][name]
        md5 = hashes.get(node["path"])
        source = CodeDatasetSource(tags={"dvc.path": node["path"]})
        digest = (md5 or node["sha256"])[:MAX_DIGEST]
        dataset = MetaDataset(source, name=name, digest=digest)
        tags = {"mlflow.data.context": name, "sha256": node["sha256"], "dvc.md5": md5 or "unknown"}
        entity = dataset._to_mlflow_entity()
        inputs.append(DatasetInput(entity, [InputTag(key, value) for key, value in tags.items()]))
    client.log_inputs(run_id, datasets=inputs)


def dvc_md5s(lock: Path) -> dict[str, str]:
    """Read the md5 of every output DVC has recorded: path to md5; empty without a lock."""
    if not lock.is_file():
        return {}
    stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
    return {
        out["path"]: out["md5"]
        for stage in stages.values()
        for out in stage.get("outs", [])
        if "md5" in out
    }


def _artifacts(home: Path) -> list[Path]:
    names = ("audit.json", "report.html", "verdict.json", "verdict.md", "lineage.json")
    return [home / "reports" / name for name in names]


def machine_tags() -> dict[str, str]:
    """Return who runs this, and on what."""
    machine = hardware()
    return {
        "mlflow.user": user(),
        "python": platform.python_version(),
        "processor": machine["processor"],
        "cores": str(machine["cores"]),
        "torch": version("torch"),
    }


def git_tags(home: Path) -> dict[str, str]:
    """Return the commit and whether tracked files differ from it; empty outside git."""
    state = git_state(home)
    if not state:
        return {}
    dirty = "unknown" if state["dirty"] is None else str(state["dirty"]).lower()
    return {"mlflow.source.git.commit": state["commit"], "git.dirty": dirty}
