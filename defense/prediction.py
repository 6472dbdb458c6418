"""What a trained model says of images: logits, classes, penultimate features."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from defense.compute import batches, device, repeatable
from defense.errors import DataError
from defense.records import ImageSet

PREDICT_BATCH = 64  # more do not stay in the cache: 500 take twice as long on a CPU


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model on the device, repeatable and in eval mode without gradients; undo it after."""
    modes = [(module, module.training) for module in model.modules()]
    state = itertools.chain(model.parameters(), model.buffers())
    home = next((tensor.device for tensor in state), torch.device("cpu"))
    required = [parameter.requires_grad for parameter in model.parameters()]
    try:
        with repeatable():
            yield model.to(device()).eval().requires_grad_(False)
    finally:
        for parameter, wanted in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(wanted)
        for module, mode in modes:
            module.training = mode
        model.to(home)


@torch.no_grad()
def logits(model: nn.Module, images: ImageSet, *, label: str = "predict") -> Tensor:
    """Compute the logits of every image: float32 ``[n, k]`` on the CPU."""
    with frozen(model):
        parts = [
            model(images.images(rows).to(device())).float().cpu()
            for rows in batches(len(images), PREDICT_BATCH, label=label)
        ]
    return torch.cat(parts) if parts else torch.zeros(0, images.num_classes)


def predict(model: nn.Module, images: ImageSet, *, label: str = "predict") -> np.ndarray:
    """Predict the class of every image: int64 ``[n]``."""
    return logits(model, images, label=label).argmax(1).numpy()


@torch.no_grad()
def features(model: nn.Module, images: ImageSet, *, label: str = "features") -> Tensor:
    """Compute what the last linear layer sees of every image, without augmentation.

    Returns:
        float32 ``[n, d]`` on the CPU.

    Raises:
        DataError: The model has no linear layer, or one that does not see one vector per image.
    """
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise DataError("expected a model with a linear layer to take features from, found none")
    seen: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    parts = []
    try:
        with frozen(model):
            for rows in batches(len(images), PREDICT_BATCH, label=label):
                model(images.images(rows).to(device()))
                parts.append(seen.pop().float().cpu())
    finally:
        hook.remove()
    if any(part.ndim != 2 for part in parts):
        raise DataError(f"expected features [n, d], got {list(parts[0].shape)}")
    return torch.cat(parts)
