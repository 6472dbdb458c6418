"""Checkpoints of long computations, named by a digest of everything that determines them."""

import hashlib
import inspect
import logging
import math
import mmap
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from defense.records import ImageSet

CHECKPOINT_SECONDS = 20.0  # work that a kill may cost, plus one step
SHORT_SAVE = 2.0  # seconds up to which a save is not worth waiting longer for
LONGEST_WAIT = 3.0  # times CHECKPOINT_SECONDS
CHUNK_BYTES = 2**24  # pixels that are digested at a time
PLAIN = (
    bool, int, float, complex, str, bytes, type(None), slice, range, np.generic, torch.dtype,
    torch.device,
)  # fmt: skip
OF_THIS_PROCESS = (logging.Logger, ModuleType)  # do nothing to a forward pass


@dataclass
class Checkpoint:
    """Where an unfinished computation lies: a file keyed by everything that determines it.

    It stays when the computation is finished, because the result still has to be written; who
    writes it deletes the folder.
    """

    path: Path | None
    saved: float = -math.inf
    took: float = 0.0

    @classmethod
    def at(cls, scratch: Path | None, parts: Iterable[bytes]) -> "Checkpoint":
        """Name the checkpoint of one computation.

        Args:
            scratch: Its folder; None keeps nothing.
            parts: Everything that determines the computation; not looked at if nothing is kept.
        """
        if scratch is None:
            return cls(None)
        key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
        return cls(scratch / f"{key}.pt")

    def load(self) -> dict[str, Any] | None:
        """Return the saved state; a damaged file is deleted with a warning."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            _require_sound(self.path)
            return dict(torch.load(self.path, map_location="cpu", weights_only=True))
        except (MemoryError, OSError):  # says nothing about the file
            raise
        except Exception as error:  # torch.load raises many kinds on damaged files
            warnings.warn(f"{self.path} is damaged, starting again ({error})", stacklevel=2)
            self.path.unlink()
            return None

    def due(self) -> bool:
        """Tell whether the last save is long enough ago, for what it took."""
        wait = CHECKPOINT_SECONDS * min(max(1.0, self.took / SHORT_SAVE), LONGEST_WAIT)
        return self.path is not None and time.monotonic() - self.saved >= wait

    def save(self, state: dict[str, Any]) -> None:
        """Save the state if it is time to."""
        if self.path is None or not self.due():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)
        self.saved = time.monotonic()
        self.took = self.saved - begin

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Map an array that grows on disk beside the state, or in an unnamed temporary file.

        What a killed computation wrote is still there if `load` returns its state.
        """
        if self.path is None:
            with tempfile.TemporaryFile() as file:
                return np.memmap(file, dtype=dtype, mode="w+", shape=shape)
        file_path = self.path.with_suffix(".array")
        file_path.parent.mkdir(parents=True, exist_ok=True)
        size = math.prod(shape) * dtype.itemsize
        if not file_path.is_file() or file_path.stat().st_size != size:
            self.path.unlink(missing_ok=True)  # a state without its array is worth nothing
            return np.memmap(file_path, dtype=dtype, mode="w+", shape=shape)
        return np.memmap(file_path, dtype=dtype, mode="r+", shape=shape)


def release(array: NDArray[Any]) -> None:
    """Let what was written to a mapped array leave main memory; it is still on disk."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


def _require_sound(path: Path) -> None:
    """Compare the bytes of a saved state with their checksums, which torch does not."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def digest_of_model(model: nn.Module) -> bytes:
    """Digest a model's structure, code and weights."""
    digest = hashlib.sha256(_structure(model))
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {_numbers(value)}".encode())
    return digest.digest()


def digest_of_images(images: ImageSet) -> bytes:
    """Digest every pixel and label of a set."""
    digest = hashlib.sha256(str(images.shape).encode())
    digest.update(np.ascontiguousarray(images.labels).data)
    rows = max(1, CHUNK_BYTES // math.prod(images.shape))
    for start in range(0, len(images), rows):
        digest.update(images.uint8(slice(start, start + rows)).data)
    return digest.digest()


def fingerprint(model: nn.Module, images: ImageSet) -> bytes:
    """Digest a model, and every pixel and label of a set."""
    return digest_of_model(model) + digest_of_images(images)


def _structure(model: nn.Module) -> bytes:
    """Describe every module: its class with its source, its own attributes, and its hooks."""
    usual = vars(nn.Module()).keys()
    facts, sources = [], dict[str, str]()
    for name, module in model.named_modules():
        kind = type(module)
        own = {key: value for key, value in vars(module).items() if key not in usual}
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        facts.append((name, kind.__module__, kind.__qualname__, told(own), list(map(_code, hooks))))
        sources[kind.__qualname__] = sources.get(kind.__qualname__) or source_of(kind)
    return repr((facts, sorted(sources.items()))).encode()


def told(value: Any) -> str:
    """Tell what a value does to a computation, without addresses of this process."""
    return _Teller().tell(value)


class _Teller:
    """Tells a value and all it holds, each object once."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[int, Any]] = {}  # held, so that no address is used again

    def tell(self, value: Any) -> str:
        """Tell a value, or which one it is if it was told before."""
        if isinstance(value, PLAIN):
            return repr(value)
        if id(value) in self.known:
            return f"object {self.known[id(value)][0]}"
        self.known[id(value)] = len(self.known), value
        if isinstance(value, dict):
            return repr([(self.tell(key), self.tell(entry)) for key, entry in value.items()])
        if isinstance(value, list | tuple):
            return repr([self.tell(entry) for entry in value])
        if isinstance(value, set | frozenset):
            return repr(sorted(map(told, value)))
        return self._object(value)

    def _object(self, value: Any) -> str:
        if isinstance(value, Tensor | np.ndarray):
            return _numbers(value)
        if isinstance(value, partial):
            return self.tell([value.func, value.args, value.keywords])
        if callable(value) and hasattr(value, "__qualname__"):
            cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
            return f"{_code(value)} {self.tell([getattr(value, '__self__', None), cells])}"
        kind = type(value)
        if isinstance(value, OF_THIS_PROCESS):
            return kind.__qualname__
        own = getattr(value, "__dict__", None)
        return f"{kind.__qualname__} {source_of(kind)} {self.tell(own)}"


def _code(function: Any) -> str:
    """Tell the code of a function, but not what it holds, which it may change when it runs."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    constants = [
        cell.cell_contents
        for cell in getattr(function, "__closure__", None) or ()
        if isinstance(cell.cell_contents, PLAIN)
    ]
    defaults = told(getattr(function, "__defaults__", None))
    place = getattr(function, "__module__", "")
    return f"{place}.{name} {_source(function)} {constants} {defaults}"


def _numbers(values: Tensor | NDArray[Any]) -> str:
    if isinstance(values, np.ndarray) and values.dtype.kind not in "biufc":
        return repr((values.dtype.str, values.shape, values.tolist()))
    tensor = torch.as_tensor(values).detach().cpu().contiguous()
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def source_of(kind: type) -> str:
    """Return the source of a class and of those it is made from, down to torch's and Python's.

    And that of the files they stand in, whose functions and constants they may use.
    """
    libraries = {"torch", "builtins", "abc"}
    own = [each for each in kind.__mro__ if each.__module__.split(".")[0] not in libraries]
    files = [sys.modules.get(each.__module__) for each in own]
    return "\n".join(map(_source, [*own, *files]))


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # compiled, or defined where no file is left, such as a prompt
        return ""


def source_digest(*paths: Path) -> bytes:
    """Digest source files, and those in folders: a result of other code is not continued.

    To be taken when the code is imported; later the files may be others.
    """
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.digest()
