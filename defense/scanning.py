"""Opens what a scan looks at, and writes what it found."""

import csv
import io
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from pydantic import TypeAdapter
from torch import nn

from defense.artifacts import (
    cell,
    read_manifest,
    require_input,
    write_bytes,
    write_json,
    write_text,
)
from defense.audit import labels_csv
from defense.compute import seeded
from defense.datasets.folder import read_images
from defense.detectors.search import CleanInputs
from defense.errors import DataError, DefenseError
from defense.evidence import Scan
from defense.independent import independent_of
from defense.influence.directions import StoredDirections
from defense.influence.store import load_store
from defense.labels import doubt_labels
from defense.models import AnyArchitecture
from defense.models.assemble import build_model
from defense.pictures import block_title, sheets
from defense.prediction import predict
from defense.recipe import Recipe
from defense.records import ImageSet
from defense.scan import Scanner, ScanSettings
from defense.storage import blinded, load_factors, load_images, load_weights, save_images, save_scan

UNFINISHED = ".unfinished"  # folder of checkpoints
RESULTS = ("scan", "affected")  # folders of what was found
ROLES = ("poisoned_train", "test", "suspect", "factors", "directions")


@dataclass(frozen=True)
class Subject:
    """A model to be scanned, its training set, and what they were read from.

    Attributes:
        model: The model.
        train: Its training set.
        directions: Directions of its rows.
        scanner: Ready to scan.
        seed: The run's seed.
        origin: Digest of every artefact, by role.
    """

    model: nn.Module
    train: ImageSet
    directions: StoredDirections
    scanner: Scanner
    seed: int
    origin: dict[str, str]


def open_subject(
    place: Callable[[str], Path],
    architecture: AnyArchitecture,
    recipe: Recipe,
    settings: ScanSettings,
    seed: int,
    scratch: Path | None,
) -> Subject:
    """Open a model with its training set, test set, factors and directions.

    Args:
        place: Where the artefact of a role lies.
        architecture: Of the model.
        recipe: It was trained with.
        settings: How blocks are sought.
        seed: The run's seed.
        scratch: Folder for checkpoints of the independent training.

    Raises:
        ArtifactError: One is missing, damaged, or of another run.
    """
    train, of_train = load_images(place("poisoned_train"))
    test, of_test = load_images(place("test"))
    placeholder = seeded(seed, "placeholder")  # its weights are replaced at once
    model = build_model(architecture, train.shape, train.num_classes, placeholder)
    of_model = load_weights(place("suspect"), model)
    factors, of_factors = load_factors(place("factors"))
    of_directions = read_manifest(place("directions"))
    found = of_train, of_test, of_model, of_factors, of_directions
    origin = {role: manifest.digest for role, manifest in zip(ROLES, found, strict=True)}
    for role in ("poisoned_train", "suspect", "factors"):
        require_input(of_directions, role, origin[role], owner=place("directions"))
    store = load_store(place("directions"))
    directions = StoredDirections.of(store, model, factors)
    clean = CleanInputs(test, seeded(seed, "scan"))
    independent = independent_of(architecture, recipe, seed, scratch)
    scanner = Scanner(settings, blinded(train), directions, clean, independent)
    return Subject(model, train, directions, scanner, seed, origin)


def scan_home(home: Path, inputs: Path | None, out: Path) -> tuple[Scan, list[str]]:
    """Scan the model in a pipeline's folder and write what was found.

    Args:
        home: The folder that holds params.yaml and artifacts.
        inputs: A folder of images that point to blocks; None scans the training set alone.
        out: The folder to write to.

    Returns:
        What was found, and a line for every block, and one for what was not looked at.

    Raises:
        DefenseError: Sections of params.yaml are not valid, an artefact is missing, or what is in
            the folder to write to would be lost.
    """
    sections = read_sections(home / "params.yaml")
    scratch, artifacts = out / UNFINISHED, home / "artifacts"
    refuse_to_replace(out, artifacts, *([] if inputs is None else [inputs]))
    subject = open_subject(lambda role: artifacts / role, *sections, scratch)
    images = None if inputs is None else read_inputs(inputs, subject.train)
    clear(out)
    if images is None:
        scan = subject.scanner.rows(subject.seed)
        doubts = doubt_labels(subject.model, subject.train, subject.directions, subject.seed)
    else:
        predicted = predict(subject.model, images, label="inputs")
        scan = subject.scanner.inputs(images, predicted, subject.seed)
    save_scan(out / "scan", scan, inputs=subject.origin)  # first: by it the folder is known
    publish(scan, subject.train, out)
    if images is None:
        write_text(out / "labels.csv", labels_csv(subject.train, doubts))
    else:
        hand_over(scan, images, predicted, subject, out)
    shutil.rmtree(scratch, ignore_errors=True)
    lines = [block_title(block, subject.train) for block in scan.blocks]
    classes = range(subject.train.num_classes)
    beyond = [] if images is None else sorted({*classes} - {*predicted.tolist()})
    return scan, [*lines, *left_out(scan, subject.train, beyond)]


def left_out(scan: Scan, train: ImageSet, beyond: Sequence[int] = ()) -> list[str]:
    """Say in a line each what a scan did not look at.

    Args:
        scan: What it found.
        train: The training set.
        beyond: Labels that no input was predicted as.
    """
    parts = (
        (scan.unchecked, "not looked at"),
        (scan.in_part, "not looked at as a whole"),
        (beyond, "not looked at, because no input is predicted as it"),
    )
    return [
        f"{what}: {', '.join(train.class_names[label] for label in labels)}"
        for labels, what in parts
        if len(labels)
    ]


def refuse_to_replace(out: Path, *kept: Path) -> None:
    """Refuse a folder to write to in which something would be replaced that is no scan's.

    Raises:
        DefenseError: It has files of these names, is one of a pipeline's artefacts, or has to do
            with a folder that is read.
    """
    here = out.resolve()
    for folder in (path.resolve() for path in kept):
        inside = any(folder.is_relative_to(here / name) for name in RESULTS)
        if inside or here.is_relative_to(folder):
            raise DefenseError(
                f"--out {out} would replace what {folder} holds: name another folder"
            )
    ours = (out / "scan" / "manifest.json").is_file() and not (out / "suspect").exists()
    if (found := leftovers(out)) and not ours:
        raise DefenseError(
            f"expected a new folder to write to, or one of an earlier scan, but {found[0]} is no "
            "scan's: move it, or name another folder with --out"
        )


def leftovers(out: Path) -> list[Path]:
    """List what an earlier scan left."""
    names = (*RESULTS, "scan.json", "blocks.csv", "labels.csv")
    return [*(out / name for name in names if (out / name).exists()), *out.glob("block_*.png")]


def clear(out: Path) -> None:
    """Remove what an earlier scan left, so that nothing stands beside an answer it is not of."""
    for path in reversed(leftovers(out)):  # the scan itself, by which the folder is known, last
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def read_inputs(path: Path, train: ImageSet) -> ImageSet:
    """Read a folder of images, or an images artefact, of the size the model takes.

    Raises:
        DataError: There are none, or an artefact's have another size.
    """
    if not (path / "manifest.json").is_file():
        return read_images(path, train.shape)
    images, _ = load_images(path)
    if images.shape != train.shape:
        raise DataError(f"expected inputs of shape {train.shape} in {path}, got {images.shape}")
    return images


def read_sections(path: Path) -> tuple[AnyArchitecture, Recipe, ScanSettings, int]:
    """Read from a params file what a scan needs of it.

    Raises:
        DefenseError: The file or a section is missing or not valid.
    """
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
        return (
            TypeAdapter[AnyArchitecture](AnyArchitecture).validate_python(params["model"]),
            Recipe.model_validate(params["train"]),
            ScanSettings.model_validate(params.get("scan", {})),
            int(params["seed"]),
        )
    except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DefenseError(
            f"expected the sections seed, model, train and scan in {path}, got: {reason}"
        ) from error


def hand_over(
    scan: Scan, images: ImageSet, predicted: np.ndarray, subject: Subject, out: Path
) -> None:
    """Write inputs that a suspected block dictates as the affected inputs of an incident.

    Of several blocks it is the one whose labels are contradicted most surely.
    """
    dictated = [given for given in scan.inputs if given.dictated]
    pointed = {given.block for given in dictated if scan.blocks[given.block].suspected}
    if not pointed:
        return
    best = min(pointed, key=lambda number: scan.blocks[number].p_value)
    places = np.array([given.place for given in dictated if given.block == best])
    chosen = images.take(places)
    labels = predicted[places]
    affected = ImageSet(chosen.pixels, labels, chosen.ids, subject.train.class_names, chosen.rows)
    save_images(out / "affected", affected, inputs={"suspect": subject.origin["suspect"]})


def publish(scan: Scan, train: ImageSet, out: Path) -> None:
    """Write what people read: a summary, the rows of every block, and pictures of them."""
    unchecked, in_part = (
        [train.class_names[label] for label in labels] for labels in (scan.unchecked, scan.in_part)
    )
    found = {
        "verdict": scan.verdict,
        "blocks": summaries(scan, train),
        "unchecked": unchecked,
        "in_part": in_part,
    }
    write_json(out / "scan.json", found)
    write_text(out / "blocks.csv", blocks_csv(scan, train))
    for name, png in sheets(scan, train).items():
        write_bytes(out / name, png)


def summaries(scan: Scan, train: ImageSet) -> list[dict[str, object]]:
    """Sum up every block, with the inputs that point to it."""
    return [
        {
            "label": train.class_names[block.label],
            "num_rows": int(block.rows.sum()),
            "coherence": block.coherence,
            "clean_coherence": block.clean_coherence,
            "expected_false": block.expected_false,
            "agreement": block.agreement,
            "usual_agreement": block.usual_agreement,
            "said": train.class_names[block.said],
            "said_share": block.said_share,
            "p_value": block.p_value,
            "suspected": block.suspected,
            "lacking": block.lacking,
            "unclear": block.unclear,
            "alike": block.alike,
            "inputs": [
                {"id": given.id, "p_value": given.p_value, "dictated": given.dictated}
                for given in scan.inputs
                if given.block == number
            ],
        }
        for number, block in enumerate(scan.blocks)
    ]


def blocks_csv(scan: Scan, train: ImageSet) -> str:
    """List the rows of every block as CSV."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["block", "judged", "row", "id", "label"])
    for number, block in enumerate(scan.blocks):
        for row in np.flatnonzero(block.rows):
            label = train.class_names[block.label]
            table.writerow([number, block.judged, row, cell(train.ids[row]), cell(label)])
    return text.getvalue()
