"""Look for poison and wrong labels in the training set alone, without an incident."""

from defense.artifacts import write_json
from defense.labels import doubt_labels
from defense.scanning import open_subject
from defense.storage import save_doubts, save_scan
from pipelines.params import Params
from pipelines.paths import Paths


def run(params: Params, paths: Paths) -> str:
    """Write the blocks of rows that were found, and what speaks against the labels."""
    subject = open_subject(
        lambda role: getattr(paths, role),
        params.model,
        params.train,
        params.scan,
        params.seed,
        paths.scratch("scan"),
    )
    scan = subject.scanner.rows(subject.seed)
    save_scan(paths.scan, scan, inputs=subject.origin)
    doubts = doubt_labels(subject.model, subject.train, subject.directions, subject.seed)
    origin = {role: subject.origin[role] for role in ("poisoned_train", "directions")}
    save_doubts(paths.doubts, doubts, inputs=origin)
    rows = sum(int(block.rows.sum()) for block in scan.suspected)
    facts = {"num_blocks": len(scan.blocks), "num_suspected": len(scan.suspected), "rows": rows}
    facts["num_unclear"] = sum(block.unclear for block in scan.blocks)
    write_json(paths.metrics("scan"), facts)
    return f"{scan.verdict}: {rows:,} rows in {len(scan.suspected)} of {len(scan.blocks)} blocks"
