"""Save and load every record as a sealed artefact: npy for tables, safetensors for weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from defense.artifacts import Manifest, Writer, open_artifact, write_artifact
from defense.errors import ArtifactError
from defense.evidence import Confirmation, FoundBlock, Incident, LabelDoubts, PointedInput, Scan
from defense.records import (
    Coverage,
    Factors,
    Flags,
    ImageSet,
    LayerFactors,
    Queries,
    Truth,
    image_set,
)

COPY_ROWS = 4096  # images copied at a time, so that saving never holds a whole set

Inputs = Mapping[str, str]


def array(values: NDArray[Any]) -> Writer:
    """Write an array as npy; never pickles."""
    return lambda path: np.save(path, values, allow_pickle=False)


def tensors(values: Mapping[str, Tensor]) -> Writer:
    """Write tensors as safetensors without metadata, which keeps the bytes stable.

    They are copied, because the format refuses tensors that share memory.
    """
    ready = {name: value.detach().cpu().contiguous().clone() for name, value in values.items()}
    return lambda path: save_file(ready, path)


def read_array(path: Path, *, mapped: bool = False) -> NDArray[Any]:
    """Read an npy file, memory-mapped if asked."""
    return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ArtifactError: The file is not safetensors.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not a safetensors file ({error})") from error


def blinded(images: ImageSet) -> ImageSet:
    """Replace ids by digests: the name of a file may tell the class it had before an attack."""
    ids = [hashlib.sha256(name.encode()).hexdigest()[:16] for name in images.ids.tolist()]
    return replace(images, ids=np.array(ids, dtype=np.str_))


def save_images(path: Path, images: ImageSet, *, inputs: Inputs | None = None) -> str:
    """Save an image set; returns the artefact's digest."""

    def pixels(file: Path) -> None:
        shape = (len(images), *images.shape)
        out = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
        for start in range(0, len(images), COPY_ROWS):
            out[start : start + COPY_ROWS] = images.uint8(slice(start, start + COPY_ROWS))
        out.flush()

    columns = {"labels.npy": array(images.labels), "ids.npy": array(images.ids)}
    meta = {"class_names": list(images.class_names)}
    return write_artifact(
        path, "images", {"pixels.npy": pixels, **columns}, meta=meta, inputs=inputs
    )


def load_images(path: Path) -> tuple[ImageSet, Manifest]:
    """Load an image set with its pixels memory-mapped."""
    manifest = open_artifact(path, "images")
    images = image_set(
        read_array(path / "pixels.npy", mapped=True),
        read_array(path / "labels.npy"),
        read_array(path / "ids.npy"),
        tuple(manifest.fact("class_names")),
    )
    return images, manifest


def save_truth(path: Path, truth: Truth, *, inputs: Inputs) -> str:
    """Save what was planted; returns the artefact's digest."""
    files = {
        "poisoned.npy": array(truth.poisoned),
        "original_labels.npy": array(truth.original_labels),
        "probe_labels.npy": array(truth.probe_labels),
        "victims.npy": array(truth.victims),
    }
    return write_artifact(
        path, "truth", files, meta={"target_class": truth.target_class}, inputs=inputs
    )


def load_truth(path: Path) -> tuple[Truth, Manifest]:
    """Load what was planted, to measure by; never for a detector or an unlearner."""
    manifest = open_artifact(path, "truth")
    truth = Truth(
        read_array(path / "poisoned.npy"),
        read_array(path / "original_labels.npy"),
        manifest.fact("target_class"),
        read_array(path / "probe_labels.npy"),
        read_array(path / "victims.npy"),
    )
    return truth, manifest


def save_model(
    path: Path, model: nn.Module, *, meta: Mapping[str, Any], inputs: Inputs | None = None
) -> str:
    """Save a model's weights and buffers; returns the artefact's digest."""
    weights = {"weights.safetensors": tensors(model.state_dict())}
    return write_artifact(path, "model", weights, meta=meta, inputs=inputs)


def load_weights(path: Path, model: nn.Module) -> Manifest:
    """Load saved weights into a model of the same architecture.

    Raises:
        ArtifactError: The weights do not fit the model.
    """
    manifest = open_artifact(path, "model")
    try:
        model.load_state_dict(read_tensors(path / "weights.safetensors"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"the weights at {path} do not fit the model that params.yaml describes ({reason}); "
            "restore the model section or run: dvc repro train"
        ) from error
    return manifest


def save_factors(path: Path, factors: Factors, *, inputs: Inputs) -> str:
    """Save EK-FAC factors; returns the artefact's digest."""
    parts = {
        f"{name}:{part}": value
        for name, layer in factors.layers.items()
        for part, value in vars(layer).items()
    }
    meta = {
        "layers": list(factors.layers),
        "num_examples": factors.num_examples,
        "model": factors.model,
        "coverage": factors.coverage.share,
        "without_factors": factors.coverage.left_out,
        "tier": factors.tier,
        "num_differentiated": factors.num_differentiated,
        "left_out": factors.left_out,
        "error": factors.error,
        "excluded": list(factors.excluded),
    }
    files = {"factors.safetensors": tensors(parts)}
    return write_artifact(path, "factors", files, meta=meta, inputs=inputs)


def load_factors(path: Path) -> tuple[Factors, Manifest]:
    """Load EK-FAC factors."""
    manifest = open_artifact(path, "factors")
    parts = read_tensors(path / "factors.safetensors")
    fields = LayerFactors.__dataclass_fields__
    layers = {
        name: LayerFactors(**{part: parts[f"{name}:{part}"] for part in fields})
        for name in manifest.fact("layers")
    }
    facts = Factors(
        layers,
        manifest.fact("num_examples"),
        manifest.fact("model"),
        Coverage(manifest.fact("coverage"), manifest.fact("without_factors")),
        manifest.fact("tier"),
        manifest.fact("num_differentiated"),
        manifest.fact("left_out"),
        manifest.fact("error"),
        tuple(manifest.fact("excluded")),
    )
    return facts, manifest


def save_scores(
    path: Path, queries: Queries, scores: NDArray[np.float32], *, inputs: Inputs
) -> str:
    """Save queries and their scores ``[q, n]``; returns the artefact's digest."""
    files = {"scores.npy": array(scores), "queries.safetensors": tensors(vars(queries))}
    return write_artifact(path, "scores", files, inputs=inputs)


def load_scores(path: Path) -> tuple[tuple[Queries, NDArray[np.float32]], Manifest]:
    """Load queries and their scores, the scores memory-mapped."""
    manifest = open_artifact(path, "scores")
    queries = Queries(**read_tensors(path / "queries.safetensors"))
    return (queries, read_array(path / "scores.npy", mapped=True)), manifest


def save_flags(path: Path, flags: Flags, *, inputs: Inputs) -> str:
    """Save a detector's answer; returns the artefact's digest."""
    files = {
        "suspicion.npy": array(flags.suspicion),
        "candidates.npy": array(flags.candidates),
        "predicted_label.npy": array(flags.predicted_label),
    }
    if flags.p_values is not None:
        files["p_values.npy"] = array(flags.p_values)
    incidents = [asdict(incident) for incident in flags.incidents]
    meta = {"threshold": flags.threshold, "verdict": flags.verdict, "incidents": incidents}
    return write_artifact(path, "flags", files, meta=meta, inputs=inputs)


def load_flags(path: Path) -> tuple[Flags, Manifest]:
    """Load a detector's answer."""
    manifest = open_artifact(path, "flags")
    sealed = "p_values.npy" in manifest.files
    flags = Flags(
        read_array(path / "suspicion.npy"),
        manifest.fact("threshold"),
        read_array(path / "candidates.npy"),
        read_array(path / "predicted_label.npy"),
        tuple(incident_of(facts) for facts in manifest.fact("incidents")),
        read_array(path / "p_values.npy") if sealed else None,
    )
    return flags, manifest


def incident_of(facts: dict[str, Any]) -> Incident:
    """Build an incident from what was saved of it."""
    names = ("affected", "expected_false", "enrichment", "alike")
    return Incident(**facts | {name: tuple(facts.get(name, ())) for name in names})


def save_scan(path: Path, scan: Scan, *, inputs: Inputs | None = None) -> str:
    """Save what a scan found; returns the artefact's digest."""
    facts = [asdict(block) for block in scan.blocks]
    rows = np.array([fact.pop("rows") for fact in facts], dtype=np.bool_)
    meta = {
        "blocks": facts,
        "inputs": [asdict(given) for given in scan.inputs],
        "alarm": scan.alarm,
        "unchecked": list(scan.unchecked),
        "in_part": list(scan.in_part),
        "verdict": scan.verdict,
    }
    return write_artifact(path, "scan", {"rows.npy": array(rows)}, meta=meta, inputs=inputs)


def load_scan(path: Path) -> tuple[Scan, Manifest]:
    """Load what a scan found."""
    manifest, rows = open_artifact(path, "scan"), read_array(path / "rows.npy")
    names = ("expected_false", "alike")
    blocks = tuple(
        FoundBlock(rows=mask, **facts | {name: tuple(facts.get(name, ())) for name in names})
        for mask, facts in zip(rows, manifest.fact("blocks"), strict=True)
    )
    given = tuple(PointedInput(**facts) for facts in manifest.fact("inputs"))
    labels = (tuple(manifest.fact(name)) for name in ("unchecked", "in_part"))
    return Scan(blocks, given, manifest.fact("alarm"), *labels), manifest


def save_doubts(path: Path, doubts: LabelDoubts, *, inputs: Inputs) -> str:
    """Save what speaks against the labels; returns the artefact's digest."""
    files = {f"{name}.npy": array(values) for name, values in vars(doubts).items()}
    return write_artifact(path, "doubts", files, meta={}, inputs=inputs)


def load_doubts(path: Path) -> tuple[LabelDoubts, Manifest]:
    """Load what speaks against the labels."""
    manifest = open_artifact(path, "doubts")
    arrays = (read_array(path / f"{name}.npy") for name in ("doubt", "suggested"))
    return LabelDoubts(*arrays), manifest


def save_confirmation(path: Path, confirmation: Confirmation, *, inputs: Inputs) -> str:
    """Save what unlearning did to the wrong predictions; returns the artefact's digest."""
    return write_artifact(path, "confirmation", {}, meta=asdict(confirmation), inputs=inputs)


def load_confirmation(path: Path) -> tuple[Confirmation, Manifest]:
    """Load what unlearning did to the wrong predictions."""
    manifest = open_artifact(path, "confirmation")
    points = tuple((rows, own, others) for rows, own, others in manifest.fact("points"))
    return Confirmation(manifest.fact("before"), points), manifest
