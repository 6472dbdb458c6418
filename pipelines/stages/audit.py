"""Measure before and after, draw the pictures and write the report."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from defense.artifacts import Manifest, require_input, write_bytes, write_json, write_text
from defense.audit import Exhibits, audit, evidence, flags_csv
from defense.html import render
from defense.pictures import draw
from defense.records import Factors
from defense.report import AuditReport, headline, summary
from defense.storage import load_factors, load_flags, load_images, load_scores, load_truth
from pipelines import paths
from pipelines.params import Params
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


def run(params: Params) -> str:
    """Write the report as JSON and HTML, the pictures and the list of flagged rows."""
    shelf = Shelf()
    exhibits, factors = collect(params, shelf)
    costs = {
        name: shelf.manifests[artifact][1].meta["gradient_samples"]
        for name, artifact in (("train", "suspect"), ("remediate", "remediated"))
    }
    report = audit(
        exhibits,
        params.audit,
        curvature=str(factors),
        methods=params.model_dump(mode="json", exclude=OTHER_SECTIONS),
        gradient_samples=costs,
        artifacts=evidence(shelf.manifests),
    )
    publish(report, exhibits)
    return summary(report)


def collect(params: Params, shelf: Shelf) -> tuple[Exhibits, Factors]:
    """Open everything the audit looks at, in the order it was made."""
    shelf.take(paths.CLEAN_TRAIN, load_images)
    test = shelf.take(paths.TEST, load_images)
    train = shelf.take(paths.POISONED_TRAIN, load_images)
    probe = shelf.take(paths.PROBE, load_images)
    truth = shelf.take(paths.TRUTH, load_truth)
    before = shelf.take(paths.SUSPECT, lambda path: load_model(path, params, train))
    affected = shelf.take(paths.AFFECTED, load_images)
    factors = shelf.take(paths.FACTORS, load_factors)
    shelf.take(paths.SCORES, load_scores)
    flags = shelf.take(paths.FLAGS, load_flags)
    after = shelf.take(paths.REMEDIATED, lambda path: load_model(path, params, train))
    exhibits = Exhibits(train, test, probe, truth, affected, flags, before, after)
    return exhibits, factors


def publish(report: AuditReport, exhibits: Exhibits) -> None:
    """Write what people and later stages read."""
    pictures = draw(report, exhibits.train, exhibits.affected, exhibits.flags, exhibits.truth)
    for name, png in pictures.items():
        write_bytes(paths.PLOTS / name, png)
    write_json(paths.REPORTS / "audit.json", report.model_dump(mode="json"))
    write_text(paths.REPORTS / "report.html", render(report, pictures))
    write_text(paths.REPORTS / "flags.csv", flags_csv(exhibits.train, exhibits.flags))
    write_json(paths.METRICS / "audit.json", headline(report))
