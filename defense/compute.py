"""Where and how things run: device, seeded randomness, batches with a progress bar."""

import ctypes
import hashlib
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from defense.errors import DefenseError

logger = logging.getLogger(__name__)

PROGRESS_DELAY = 2.0  # seconds a step may take before its progress bar appears
LOG_INTERVAL = 10.0  # seconds between two states of a bar where there is no terminal


def device() -> torch.device:
    """Return the device named by DEFENSE_DEVICE (default ``auto``: CUDA if there is one).

    It comes from the environment and not from params.yaml, so that the same pipeline lock
    holds on machines with and without an accelerator.

    Raises:
        DefenseError: The name is not a device, or the device is not there.
    """
    name = os.environ.get("DEFENSE_DEVICE", "auto")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise DefenseError(
            f"DEFENSE_DEVICE={name} cannot be used ({str(error).splitlines()[0]}); "
            "use auto, cpu or cuda"
        ) from error
    return chosen


def runs_on() -> dict[str, str]:
    """Name the device, by its product name if it is an accelerator, and the version of torch."""
    place = device()
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    return {"device": name, "torch": torch.__version__}


def seeded(seed: int, stream: str) -> torch.Generator:
    """Return a random generator for one named purpose.

    Streams are independent: adding a draw to one stage leaves all others as they were.
    """
    number = int.from_bytes(hashlib.sha256(f"{seed}:{stream}".encode()).digest()[:8], "big")
    return torch.Generator().manual_seed(number % 2**63)


def progress(**options: Any) -> tqdm:
    """Return a bar with the time left, for anything that may take a few seconds.

    Args:
        options: As tqdm takes them: iterable or total, desc, unit.
    """
    interval = 0.1 if sys.stderr.isatty() else LOG_INTERVAL
    return tqdm(
        **options, delay=PROGRESS_DELAY, mininterval=interval, maxinterval=interval, leave=False
    )


def batches(
    num_rows: int, batch_size: int, *, label: str, first: int = 0
) -> Iterator[NDArray[np.int64]]:
    """Yield consecutive row numbers in batches, with a progress bar and the time left.

    Args:
        num_rows: Rows in all.
        batch_size: Rows of a batch.
        label: What the bar is called.
        first: Rows that were done before.
    """
    starts = range(first, num_rows, batch_size)
    total, begin = -(-num_rows // batch_size), first // batch_size
    bar = progress(iterable=starts, desc=label, unit="batch", total=total, initial=begin)
    for start in bar:
        yield np.arange(start, min(start + batch_size, num_rows))


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """Log how long a phase took; the record carries `phase` and `seconds`."""
    begin = time.perf_counter()
    yield
    seconds = time.perf_counter() - begin
    logger.info("%s: %.1f s", phase, seconds, extra={"phase": phase, "seconds": seconds})


def pixel_store(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Allocate uint8 pixels in an unnamed temporary file, so that no set has to fit in memory."""
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)


def trim_memory() -> None:
    """Return freed memory to the system; glibc keeps half a GiB of freed tensors otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


@contextmanager
def repeatable() -> Iterator[None]:
    """Keep products in the precision they are asked for, and sums on CUDA in one order."""
    products, precision = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    reduced = products.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    products.allow_bf16_reduced_precision_reduction = False
    flags = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    try:
        with cast(AbstractContextManager[None], flags):
            yield
    finally:
        products.allow_bf16_reduced_precision_reduction = reduced
        torch.set_float32_matmul_precision(precision)


def has_bf16(place: torch.device) -> bool:
    """Tell whether a device multiplies bfloat16 in hardware, accumulating in float32."""
    if place.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()  # oneDNN says yes where it only emulates
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def placed(values: Any, place: torch.device) -> Any:
    """Move the tensors of a nested dictionary to a device."""
    if isinstance(values, Tensor):
        return values.to(place)
    return {name: placed(value, place) for name, value in values.items()}
