"""Judge the report and write verdict and lineage; ``defense gate`` turns it into an exit code."""

from defense.artifacts import sha256_file, write_json
from defense.gate import judge, write_verdict
from defense.lineage import write_lineage
from defense.report import read_report
from pipelines import paths
from pipelines.params import Params


def run(params: Params) -> str:
    """Write the verdict and the lineage; a blocked release is a result, not a failure."""
    file = paths.REPORTS / "audit.json"
    verdict = judge(read_report(file), sha256_file(file), params.gate)
    write_verdict(paths.REPORTS, verdict)
    write_lineage(paths.HOME)
    write_json(paths.METRICS / "gate.json", {"passed": verdict.passed})
    return f"{'pass' if verdict.passed else 'BLOCKED'}, see {paths.REPORTS}/verdict.md"
