"""What a model is trained for: its loss, its distribution of labels, and what is measured."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from defense.checkpoints import source_of, told


class Task(ABC):
    """What influence needs to know; every function treats each sample on its own."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Training loss of every sample, ``[n]``, from outputs ``[n, k]``."""

    @abstractmethod
    def sample(self, outputs: Tensor, draws: Tensor) -> Tensor:
        """Draw targets from the model's own distribution with uniform numbers ``[n]``.

        One number per row makes the draw independent of how rows are batched.
        """

    @abstractmethod
    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Measure how much every sample's output speaks for a target, ``[n]``."""

    @abstractmethod
    def loss_scale(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the factors f ``[n]`` with ``grad loss = -f grad measure``.

        Loss and measure must have parallel gradients, so that both kinds of score follow from
        one backward pass.
        """

    def digest(self) -> bytes:
        """Name the task, its settings and its code, for checkpoints and caches."""
        kind = type(self)
        name = f"{kind.__module__}.{kind.__qualname__}"
        return f"{name} {told(vars(self))} {source_of(kind)}".encode()


class Classification(Task):
    """Cross-entropy, measured by the margin of a label."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Task.loss`."""
        return F.cross_entropy(outputs, targets, reduction="none")

    def sample(self, outputs: Tensor, draws: Tensor) -> Tensor:
        """See `Task.sample`; inverts the cumulative distribution."""
        cumulative = outputs.double().softmax(1).cumsum(1)
        labels = torch.searchsorted(cumulative, draws.double()[:, None], right=True).squeeze(1)
        return labels.clamp_max(outputs.shape[1] - 1)

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Task.measure`: a logit minus the log-sum-exp of all others (Park et al. 2023)."""
        index = targets[:, None]
        chosen = outputs.gather(1, index).squeeze(1)
        return chosen - outputs.scatter(1, index, -torch.inf).logsumexp(1)

    def loss_scale(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Task.loss_scale`: the probability of all other labels, without cancellation."""
        return torch.sigmoid(-self.measure(outputs, targets))


def cotangents(
    function: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor
) -> Tensor:
    """Differentiate a value of every sample with respect to its outputs: ``[n, k]``."""
    with torch.enable_grad():
        free = outputs.detach().requires_grad_()
        (result,) = torch.autograd.grad(function(free, targets).sum(), free)
    return result


CLASSIFICATION = Classification()
