"""How a model is trained: the settings of one training and its learning-rate schedule."""

import math
from typing import Literal

from pydantic import Field

from defense.method import Method


class Recipe(Method):
    """Training by stochastic gradient descent on cross-entropy, without label smoothing.

    Attributes:
        epochs: Passes over the data.
        batch_size: Rows per step.
        learning_rate: Peak learning rate.
        momentum: Nesterov momentum of ``sgd``; 0 turns it off.
        weight_decay: L2 penalty on every parameter.
        schedule: ``triangle`` (linear warm-up, then linear decay), ``cosine``, ``steps`` (x 0.1
            at 35 %, 60 % and 87.5 %, the paper's) or ``constant``.
        warmup: Share of the steps over which ``triangle`` warms up.
        final_rate: Share of the peak that ``triangle`` falls to; None is 0.01.
        shift: Largest random shift in pixels, filled with black.
        flip: Mirror half of the images.
        precision: ``bf16`` keeps an fp32 master copy; worth it where the hardware has bf16.
        optimizer: ``sgd`` (with momentum), ``adam`` or ``adadelta``.
        clip_norm: Longest gradient, in the Euclidean norm over all parameters; None is no limit.
        clip_value: Largest entry of the gradient; None is no limit.
    """

    epochs: int = Field(gt=0)
    batch_size: int = Field(128, gt=1)
    learning_rate: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    schedule: Literal["triangle", "cosine", "steps", "constant"] = "triangle"
    warmup: float = Field(0.2, ge=0, lt=1)
    final_rate: float | None = Field(None, ge=0.01, lt=1)
    shift: int = Field(0, ge=0)
    flip: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Literal["sgd", "adam", "adadelta"] = "sgd"
    clip_norm: float | None = Field(None, gt=0)
    clip_value: float | None = Field(None, gt=0)


def learning_rate_at(recipe: Recipe, progress: float) -> float:
    """Learning rate after a share `progress` in [0, 1) of all steps."""
    if recipe.schedule == "constant":
        factor = 1.0
    elif recipe.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    elif recipe.schedule == "steps":
        factor = 0.1 ** sum(progress >= mark for mark in (0.35, 0.6, 0.875))
    else:
        last = recipe.final_rate or 0.0  # None falls to nothing, and stops before
        rising = progress / recipe.warmup if recipe.warmup else 1.0
        falling = last + (1 - last) * (1 - progress) / (1 - recipe.warmup)
        factor = max(min(rising, falling), 0.01)
    return recipe.learning_rate * factor
