"""Parameter importances and dampening, which SSD and Potion share (Foster et al. 2024)."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from defense.compute import batches, device
from defense.prediction import frozen
from defense.records import ImageSet

Importance = dict[str, Tensor]
SAMPLE_CHUNK = 32  # per-sample gradients held at a time


def batch_importance(
    model: nn.Module,
    images: ImageSet,
    loss: Callable[[Tensor, Tensor], Tensor],
    power: int,
    *,
    batch_size: int,
    label: str,
) -> Importance:
    """Average a power of the absolute batch gradients, without augmentation, in eval mode.

    Args:
        model: Stays as it is.
        images: Must not be empty.
        loss: From logits and labels of a batch to its loss.
        power: 2 for squares, 1 for absolute values.
        batch_size: Rows per gradient.
        label: Text of the progress bar.
    """
    with frozen(model):
        model.requires_grad_(True)
        names, parameters = zip(*model.named_parameters(), strict=True)
        total = [torch.zeros_like(parameter) for parameter in parameters]
        count = 0
        for rows in batches(len(images), batch_size, label=label):
            logits = model(images.images(rows).to(device()))
            value = loss(logits, images.targets(rows).to(device()))
            slopes = torch.autograd.grad(value, parameters, materialize_grads=True)
            for sum_, part in zip(total, slopes, strict=True):
                sum_ += part.abs() ** power
            count += 1
        return {name: (sum_ / count).cpu() for name, sum_ in zip(names, total, strict=True)}


def sample_importance(model: nn.Module, images: ImageSet, *, label: str) -> Importance:
    """Average the squared gradients of single rows: the diagonal of the empirical Fisher."""
    with frozen(model):
        weights = {name: value.detach() for name, value in model.named_parameters()}
        state = dict(model.named_buffers())

        def loss(values: Mapping[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
            logits = functional_call(model, {**values, **state}, (image[None],))
            return F.cross_entropy(logits, target[None])

        per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        for rows in batches(len(images), SAMPLE_CHUNK, label=label):
            targets = images.targets(rows).to(device())
            for name, part in per_sample(
                weights, images.images(rows).to(device()), targets
            ).items():
                total[name] += part.square().sum(0)
        return {name: (value / len(images)).cpu() for name, value in total.items()}


@torch.no_grad()
def dampened(
    model: nn.Module, forget: Importance, everything: Importance, alpha: float, strength: float
) -> nn.Module:
    """Shrink the parameters that matter more to the forget set than to all rows (eq. 4 and 5).

    Args:
        model: Stays as it is.
        forget: Importances for the forget set.
        everything: Importances for all rows.
        alpha: A parameter is chosen if its importance for the forget set is above this many
            times that for all rows.
        strength: A chosen parameter is multiplied by this times the inverse ratio, at most 1.
    """
    changed = copy.deepcopy(model)
    for name, parameter in changed.named_parameters():
        ours, all_rows = forget[name], everything[name]
        factor = (strength * all_rows / ours).clamp(max=1)
        parameter.copy_(torch.where(ours > alpha * all_rows, parameter * factor, parameter))
    return changed
