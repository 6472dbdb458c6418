"""Teachers: fixed models that unlearners measure a student against."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense.compute import device


def teacher(model: nn.Module) -> nn.Module:
    """Copy a model to the device, fixed and in eval mode."""
    return copy.deepcopy(model).to(device()).eval().requires_grad_(False)


def divergence(said: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute KL(softmax(wanted/T) || softmax(said/T)) T^2, the mean over rows.

    Args:
        said: The student's logits ``[n, k]``.
        wanted: The teacher's logits ``[n, k]``.
        temperature: T.
    """
    student = F.log_softmax(said.float() / temperature, dim=1)
    target = F.log_softmax(wanted.float() / temperature, dim=1)
    return F.kl_div(student, target, log_target=True, reduction="batchmean") * temperature**2


@torch.no_grad()
def asked(model: nn.Module, batch: Tensor) -> Tensor:
    """Compute a teacher's logits."""
    logits: Tensor = model(batch)
    return logits
