"""Record the run in MLflow, once per lineage."""

from defense.artifacts import write_json
from defense.gate import read_verdict
from defense.lineage import read_lineage
from defense.report import read_report
from defense.tracking import Recorded, track
from pipelines.params import Params
from pipelines.paths import HOME, Paths


def run(params: Params, paths: Paths) -> str:
    """Write what was recorded; the run's id is the server's and stays out of the file."""
    recorded = Recorded(
        HOME,
        read_report(paths.reports / "audit.json"),
        read_lineage(HOME),
        read_verdict(paths.reports / "verdict.json").passed,
    )
    run_id = track(recorded, params.tracking.experiment)
    record = {"experiment": params.tracking.experiment, "lineage": recorded.lineage["digest"]}
    write_json(paths.reports / "tracked.json", record)
    return f"MLflow run {run_id}"
