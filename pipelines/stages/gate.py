"""Judge the report and write verdict and lineage; ``defense gate`` turns it into an exit code."""

from defense.artifacts import sha256_file, write_json
from defense.gate import judge, write_verdict
from defense.lineage import write_lineage
from defense.report import read_report
from pipelines.params import Params
from pipelines.paths import HOME, Paths


def run(params: Params, paths: Paths) -> str:
    """Write the verdict and the lineage; a blocked release is a result, not a failure."""
    file = paths.reports / "audit.json"
    verdict = judge(read_report(file), sha256_file(file), params.gate)
    write_verdict(paths.reports, verdict)
    write_lineage(HOME)
    write_json(paths.metrics("gate"), {"passed": verdict.passed})
    return f"{'pass' if verdict.passed else 'BLOCKED'}, see {paths.reports}/verdict.md"
