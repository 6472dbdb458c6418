"""Smooth trigger: one low-frequency pattern for all images (Zeng et al. 2021; method card 2.2)."""

import logging
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from defense.attacks.triggered import Stamp, TriggerAttack
from defense.checkpoints import Checkpoint, fingerprint
from defense.compute import device, progress, seeded
from defense.contracts import Surrogate
from defense.errors import DataError
from defense.prediction import frozen
from defense.records import ImageSet
from defense.statistics import channel_statistics

logger = logging.getLogger(__name__)

OVERSHOOT = 0.02  # of a DeepFool perturbation
DEEPFOOL_STEPS = 200
SIGMA = 6 / 32  # of the Gaussian filter, as a share of the image's side
TRUNCATE = 2.5  # deviations at which the filter ends: 30 taps on 32 pixels
VERSION = 2  # of the search; a checkpoint of another version is not continued
DOMINANT = 0.05  # share of changed labels from which on the search follows the commonest one


class Smooth(TriggerAttack):
    """Add a universal low-frequency perturbation that was fitted to mislead a clean model.

    The fit repeats passes over some train images in random order: each image whose label the
    pattern does not change yet is pushed towards one class by DeepFool, and the push is
    smoothed and added to the pattern. The class it aims at follows the commonest wrong label;
    the poison's label is `target_class` whatever that is. Unlike the source's, the search sees
    the images as they will be stamped, clipped to [0, 1], and leaves out those that already are
    of the class it aims at.

    Attributes:
        num_images: Train images the pattern is fitted on; 100 in the source.
        fooling: The fit ends when this share of them changes its label; 0.2 in the source.
        passes: Largest number of passes; then the best pattern so far is used. The source has
            no limit.
        amplitude: Largest value of the pattern, in [0, 1]; its smallest is 0.
        paper_artifact: Add the pattern to normalised pixels and stretch each triggered image
            to [0, 1] there, as the Delta-Influence authors' notebook does: most of that
            trigger is a loss of contrast. Off, it is added to pixels and clipped.
    """

    name: Literal["smooth"] = "smooth"
    num_images: int = Field(100, gt=0)
    fooling: float = Field(0.2, gt=0, le=1)
    passes: int = Field(50, gt=0)
    amplitude: float = Field(0.2, gt=0, le=1)
    paper_artifact: bool = False

    def trigger(self, train: ImageSet, generator: torch.Generator, surrogate: Surrogate) -> Stamp:
        """See `TriggerAttack.trigger`."""
        rows = torch.randperm(len(train), generator=generator)[: self.num_images].numpy()
        chosen = train.take(np.sort(rows))
        model = surrogate.model()
        target = train.class_index(self.target_class, role="attack.target_class")
        key = f"{VERSION} {self.model_dump_json()}".encode(), fingerprint(model, chosen)
        checkpoint = Checkpoint.at(surrogate.scratch, key)
        with frozen(model):
            pattern, fooled = self._fit(model, chosen.images().to(device()), target, checkpoint)
        logger.info("smooth trigger: changes %.0f %% of a clean model's labels", 100 * fooled)
        if fooled == 0:
            raise DataError(
                f"attack smooth: no label of {len(chosen)} images changes after {self.passes} "
                "passes; raise attack.passes, attack.num_images or attack.amplitude"
            )
        if fooled < self.fooling:
            warnings.warn(
                f"smooth trigger: aimed at {self.fooling:.0%} of the labels", stacklevel=2
            )
        if self.paper_artifact:
            return _stretcher(pattern, *channel_statistics(train))
        return lambda pixels: np.rint(np.clip(pixels + 255 * pattern, 0, 255)).astype(np.uint8)

    def _fit(
        self, model: nn.Module, images: Tensor, target: int, checkpoint: Checkpoint
    ) -> tuple[NDArray[np.float32], float]:
        """Search the pattern: float32 ``[c, h, w]``, and the share of labels it changes."""
        labels, count = _classes(model, images), len(images)
        state: dict[str, Any] = checkpoint.load() or {
            "pattern": torch.zeros(images.shape[1:]),
            "best": torch.zeros(images.shape[1:]),
            "fooled": -1.0,
            "target": target,
            "done": 0,
        }
        total = self.passes * count
        with progress(total=total, initial=state["done"], desc="smooth trigger") as bar:
            while state["done"] < total and state["fooled"] < self.fooling:
                around, place = divmod(state["done"], count)
                number = int(torch.randperm(count, generator=seeded(around, "pass"))[place])
                self._push(model, images[number], int(labels[number]), state)
                state["done"] += 1
                if state["done"] % count == 0:
                    _judge(model, images, labels, state)
                checkpoint.save(state)
                bar.update()
        pattern: NDArray[np.float32] = state["best"].numpy()
        return pattern, float(state["fooled"])

    def _push(self, model: nn.Module, image: Tensor, label: int, state: dict[str, Any]) -> None:
        """Let one image whose label the pattern does not change yet move the pattern."""
        moved = (image + state["pattern"].to(image.device)).clamp(0, 1)
        if label == state["target"] or int(_classes(model, moved[None])) != label:
            return
        push = deepfool(model, moved, state["target"])
        if push is None:
            return
        pattern = smoothed(state["pattern"].numpy() + smoothed(push.cpu().numpy()))
        low, high = pattern.min(), pattern.max()
        scaled = self.amplitude * (pattern - low) / max(high - low, 1e-12)
        state["pattern"] = torch.from_numpy(scaled.astype(np.float32))


def _judge(model: nn.Module, images: Tensor, labels: Tensor, state: dict[str, Any]) -> None:
    """After a pass: keep the pattern if it is the best, and aim at the commonest wrong label."""
    now = _classes(model, (images + state["pattern"].to(images.device)).clamp(0, 1))
    wrong = now[now != labels]
    share = len(wrong) / len(labels)
    if share > state["fooled"]:
        state["best"], state["fooled"] = state["pattern"], share
    if share > DOMINANT:
        state["target"] = int(wrong.mode().values)


@torch.no_grad()
def _classes(model: nn.Module, images: Tensor) -> Tensor:
    classes: Tensor = model(images).argmax(1)
    return classes


def smoothed(pattern: NDArray[np.float32]) -> NDArray[np.float32]:
    """Blur every channel of ``[c, h, w]`` by the source's Gaussian, with zeros around it."""
    sigma = [0.0, *(SIGMA * side for side in pattern.shape[1:])]
    blurred: NDArray[np.float32] = gaussian_filter(
        pattern, sigma, mode="constant", truncate=TRUNCATE
    )
    return blurred


def deepfool(model: nn.Module, image: Tensor, target: int) -> Tensor | None:
    """Find a small change that makes a model say a class (Moosavi-Dezfooli et al. 2016).

    The gradients are those of logits: of softmax outputs they vanish on confident images.

    Args:
        model: A model with fixed parameters.
        image: ``[c, h, w]``.
        target: The class.

    Returns:
        The change ``[c, h, w]``; None if the class is not reached.
    """
    change = torch.zeros_like(image)
    for _ in range(DEEPFOOL_STEPS):
        moved = (image + (1 + OVERSHOOT) * change).requires_grad_(True)
        logits = model(moved[None])[0]
        top = int(logits.argmax())
        if top == target:
            return (1 + OVERSHOOT) * change
        gap = logits[target] - logits[top]
        (slope,) = torch.autograd.grad(gap, moved)
        change = change + (gap.abs() / slope.square().sum().clamp_min(1e-12)).detach() * slope
    return None


def _stretcher(
    pattern: NDArray[np.float32], mean: Tensor, std: Tensor
) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Stamp in normalised space and stretch every image to [0, 1] there."""
    centre, scale = mean.numpy(), std.numpy()

    def stamp(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        seen = (pixels / np.float32(255) - centre) / scale + pattern
        low = seen.min((1, 2, 3), keepdims=True)
        high = seen.max((1, 2, 3), keepdims=True)
        stretched = (seen - low) / np.maximum(high - low, 1e-12)
        return np.rint(np.clip(255 * (stretched * scale + centre), 0, 255)).astype(np.uint8)

    return stamp
