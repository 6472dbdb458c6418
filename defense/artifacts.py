"""Artefacts: folders with a manifest that seals every file by sha256.

The digest of an artefact is the sha256 of its ``manifest.json``. A manifest also names the
digests of the artefacts it was computed from, so an edited, truncated or mismatched input is
noticed by the next stage, and a verdict can be followed back to the training bytes. Needs
neither torch nor numpy, so that the gate can verify evidence in milliseconds.
"""

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defense.errors import ArtifactError

MANIFEST = "manifest.json"
VERSION = 1

Writer = Callable[[Path], None]


@dataclass(frozen=True)
class Manifest:
    """What an artefact is, what it holds and what it was computed from.

    Attributes:
        kind: What the artefact is, such as ``images`` or ``model``.
        files: sha256 of every file, by name.
        inputs: Digest of every artefact this one was computed from, by role.
        meta: Small JSON facts that belong to the kind.
        digest: sha256 of the manifest itself, which identifies the artefact.
    """

    kind: str
    files: dict[str, str]
    inputs: dict[str, str]
    meta: dict[str, Any]
    digest: str

    def fact(self, name: str) -> Any:
        """Return one of the facts in `meta`.

        Raises:
            ArtifactError: It is not there.
        """
        if name not in self.meta:
            raise ArtifactError(
                f"the manifest of an artefact of kind '{self.kind}' lacks '{name}'; "
                "remake the artefact with dvc repro"
            )
        return self.meta[name]


def to_json(value: Any) -> str:
    """Write canonical JSON: sorted keys, two spaces, a final newline, no NaN."""
    return json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON atomically."""
    write_text(path, to_json(value))


def cell(text: str) -> str:
    """Quote what a spreadsheet would run as a formula; file and class names are untrusted."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write_artifact(
    path: Path,
    kind: str,
    files: Mapping[str, Writer],
    *,
    meta: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
) -> str:
    """Write an artefact folder and swap it into place when it is complete.

    Args:
        path: The folder to write; an older artefact there is replaced.
        kind: What the artefact is; checked when it is opened.
        files: For every file name, a function that writes the file at the path it is given.
        meta: Small JSON facts.
        inputs: Digests of the artefacts this one was computed from.

    Returns:
        The digest of the new artefact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_by_a_kill in _abandoned(path):
        if left_by_a_kill.suffix == ".old" and not path.exists():
            left_by_a_kill.rename(path)  # all there is until the new one stands
        else:
            shutil.rmtree(left_by_a_kill)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.{os.getpid()}."))
    try:
        for name, write in files.items():
            write(work / name)
        manifest = {
            "kind": kind,
            "version": VERSION,
            "files": {name: sha256_file(work / name) for name in files},
            "inputs": dict(inputs or {}),
            "meta": dict(meta or {}),
        }
        (work / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
        work.chmod(0o755)
        _swap(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return sha256_file(path / MANIFEST)


def _abandoned(path: Path) -> Iterator[Path]:
    """Yield unfinished folders of an artefact that no other process of this machine writes."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*/"):
        writer = re.fullmatch(r"(\d{1,9})\.\w{8}(\.old)?", folder.name[len(path.name) + 2 :])
        if writer and not _is_other(int(writer[1])):
            yield folder


def _is_other(process: int) -> bool:
    """Tell whether another process of this number runs."""
    if process == os.getpid() or os.name != "posix":
        return False
    try:
        os.kill(process, 0)  # asks, and sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it is somebody else's
    return True


def _swap(new: Path, path: Path) -> None:
    """Put the folder `new` at `path`; the old one is kept until the new one stands."""
    old = new.with_name(new.name + ".old")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def open_artifact(path: Path, kind: str) -> Manifest:
    """Read a manifest and check every file of the artefact against it.

    Args:
        path: The artefact's folder.
        kind: The kind the caller needs.

    Returns:
        The manifest, with the artefact's digest.

    Raises:
        ArtifactError: The artefact is missing, of another kind or version, or a file is
            missing or does not have the sha256 the manifest states.
    """
    manifest = read_manifest(path)
    if manifest.kind != kind:
        raise ArtifactError(
            f"expected an artefact of kind '{kind}' at {path}, got '{manifest.kind}'"
        )
    for name, expected in manifest.files.items():
        _check_file(path / name, expected)
    return manifest


def _check_file(file: Path, expected: str) -> None:
    if not file.is_file():
        raise ArtifactError(f"{file} is missing; run: dvc repro")
    actual = sha256_file(file)
    if actual != expected:
        raise ArtifactError(
            f"{file} was truncated or edited: expected sha256 {expected[:12]}…, "
            f"got {actual[:12]}…; restore it with dvc checkout or remake it with dvc repro"
        )


def read_manifest(path: Path) -> Manifest:
    """Read a manifest without checking the files it names.

    Raises:
        ArtifactError: There is no readable manifest of this version.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise ArtifactError(f"expected an artefact at {path}, found none; run: dvc repro")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["version"] != VERSION:
            raise ArtifactError(f"{file} has format version {raw['version']}, expected {VERSION}")
        files, inputs, meta = (dict(raw[part]) for part in ("files", "inputs", "meta"))
        return Manifest(str(raw["kind"]), files, inputs, meta, digest=sha256_file(file))
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{file} is not a manifest ({error}); remake the artefact with dvc repro"
        ) from error


def require_input(manifest: Manifest, role: str, digest: str, *, owner: Path) -> None:
    """Refuse an artefact that was computed from something else than what is at hand.

    Raises:
        ArtifactError: The digest recorded for `role` differs from `digest`.
    """
    recorded = manifest.inputs.get(role)
    if recorded != digest:
        raise ArtifactError(
            f"{owner} was computed from another {role}: it records {str(recorded)[:12]}…, "
            f"the one at hand is {digest[:12]}…; run: dvc repro"
        )
