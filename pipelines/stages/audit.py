"""Measure before and after, draw the pictures and write the report."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from defense.artifacts import (
    Manifest,
    open_artifact,
    require_input,
    write_bytes,
    write_json,
    write_text,
)
from defense.audit import Exhibits, audit, evidence, flags_csv, labels_csv
from defense.compute import seeded
from defense.detectors.delta_influence import DeltaInfluence
from defense.html import render
from defense.pictures import doubtful, draw, sheets
from defense.records import Case, Factors
from defense.report import AuditReport, headline, summary
from defense.storage import (
    blinded,
    load_confirmation,
    load_doubts,
    load_factors,
    load_flags,
    load_images,
    load_scan,
    load_scores,
    load_truth,
)
from pipelines.params import Params
from pipelines.paths import REFERENCES, Paths
from pipelines.stages.common import load_model

T = TypeVar("T")
OTHER_SECTIONS = {"gate", "tracking"}  # what happens after the audit


class Shelf:
    """Opens artefacts and notes the manifest of each, so that the report can name them all."""

    def __init__(self) -> None:
        """Start empty."""
        self.manifests: dict[str, tuple[Path, Manifest]] = {}

    def note(self, path: Path, manifest: Manifest) -> None:
        """Note an opened artefact, and refuse it if it belongs to another run."""
        for role in manifest.inputs.keys() & self.manifests.keys():
            require_input(manifest, role, self.manifests[role][1].digest, owner=path)
        self.manifests[path.name] = path, manifest

    def take(self, path: Path, load: Callable[[Path], tuple[T, Manifest]]) -> T:
        """Open an artefact with the loader of its kind."""
        value, manifest = load(path)
        self.note(path, manifest)
        return value


def run(params: Params, paths: Paths) -> str:
    """Write the report as JSON and HTML, the pictures and the list of flagged rows."""
    shelf = Shelf()
    exhibits, factors = collect(params, paths, shelf)
    costs = {
        name: shelf.manifests[artifact][1].meta["gradient_samples"]
        for name, artifact in (("train", "suspect"), ("remediate", "remediated"))
    }
    report = audit(
        exhibits,
        params.audit,
        curvature=str(factors),
        methods=methods_of(params, paths),
        gradient_samples=costs,
        artifacts=evidence(shelf.manifests),
    )
    publish(report, exhibits, paths)
    return summary(report)


def methods_of(params: Params, paths: Paths) -> dict[str, Any]:
    """Collect the settings of all methods that took part."""
    methods = params.model_dump(mode="json", exclude=OTHER_SECTIONS)
    if paths.detection.name in REFERENCES:
        methods["detector"] = {"name": paths.detection.name}
    return methods


def collect(params: Params, paths: Paths, shelf: Shelf) -> tuple[Exhibits, Factors]:
    """Open everything the audit looks at, in the order it was made."""
    shelf.take(paths.clean_train, load_images)
    test = shelf.take(paths.test, load_images)
    train = shelf.take(paths.poisoned_train, load_images)
    probe = shelf.take(paths.probe, load_images)
    truth = shelf.take(paths.truth, load_truth)
    before = shelf.take(paths.suspect, lambda path: load_model(path, params, train))
    affected = shelf.take(paths.affected, load_images)
    factors = shelf.take(paths.factors, load_factors)
    scores = shelf.take(paths.scores, load_scores)
    shelf.note(paths.directions, open_artifact(paths.directions, "row_store"))
    scanned = paths.scan.is_dir()
    scan = shelf.take(paths.scan, load_scan) if scanned else None
    doubts = shelf.take(paths.doubts, load_doubts) if scanned else None
    flags = shelf.take(paths.flags, load_flags)
    tried = paths.confirmation.is_dir()
    confirmation = shelf.take(paths.confirmation, load_confirmation) if tried else None
    after = shelf.take(paths.remediated, lambda path: load_model(path, params, train))
    case = Case(blinded(train), before, *scores)
    published = published_rule(params).detect(case, seeded(params.seed, "published"))
    exhibits = Exhibits(
        train,
        test,
        probe,
        truth,
        affected,
        flags,
        published,
        before,
        after,
        scan,
        doubts,
        confirmation,
    )
    return exhibits, factors


def published_rule(params: Params) -> DeltaInfluence:
    """The paper's rule, which stands beside whichever one was chosen; it needs one transform."""
    return DeltaInfluence(affected=1, tolerance=min(1, params.transforms.num_transforms - 1))


def publish(report: AuditReport, exhibits: Exhibits, paths: Paths) -> None:
    """Write what people and later stages read."""
    train = exhibits.train
    pictures = draw(report, train, exhibits.affected, exhibits.flags, exhibits.truth)
    pictures |= {} if exhibits.scan is None else sheets(exhibits.scan, train)
    if exhibits.doubts is not None:
        pictures["doubtful.png"] = doubtful(exhibits.doubts, train)
        write_text(paths.reports / "labels.csv", labels_csv(train, exhibits.doubts))
    else:
        (paths.reports / "labels.csv").unlink(missing_ok=True)
    if paths.plots.exists():  # an earlier run may have drawn others
        shutil.rmtree(paths.plots)
    for name, png in pictures.items():
        write_bytes(paths.plots / name, png)
    write_json(paths.reports / "audit.json", report.model_dump(mode="json"))
    write_text(paths.reports / "report.html", render(report, pictures))
    write_text(paths.reports / "flags.csv", flags_csv(train, exhibits.flags))
    write_json(paths.metrics("audit"), headline(report))
