"""Queries of Delta-Influence: affected inputs and random transforms of them (method card 3.6)."""

from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from defense.method import Method
from defense.records import Queries

Transform = Callable[[Tensor], Tensor]

BLUR_KERNEL = (5, 9)  # columns, rows
ELASTIC_SIGMA = 5.0


class TransformSettings(Method):
    """How many transforms of every affected input are scored.

    Attributes:
        num_transforms: Random transforms per affected input; the paper uses 50.
        ablations: Score the changed images under the predicted label, and the unchanged image
            under the other labels, too (the paper's image-only and label-only).
    """

    num_transforms: int = Field(50, gt=0)
    ablations: bool = False


def transforms(shape: tuple[int, int, int]) -> list[Transform]:
    """List the paper's image transforms for images of a shape, on pixels in [0, 1].

    Two have to yield to tiny images: the elastic transform smooths its displacement with a
    kernel that may not be larger than the image, so its sigma is capped; swapping red and
    green is left out for grey images.
    """
    channels, height, width = shape
    sigma = min(ELASTIC_SIGMA, (min(height, width) - 2) / 4)
    kernel = [
        min(size, 2 * side - 1) for size, side in zip(BLUR_KERNEL, (width, height), strict=True)
    ]
    ops: list[Transform] = [
        TF.horizontal_flip,
        v2.RandomAffine(180, scale=(1.0, 2.0), shear=10),
        v2.ElasticTransform(alpha=150.0, sigma=sigma),
        v2.GaussianBlur(kernel, (8.0, 10.0)),
        TF.invert,
    ]
    colour = {"saturation": (0.6, 1.4), "hue": 0.1} if channels == 3 else {}
    ops.append(v2.ColorJitter(brightness=0.1, contrast=0.1, **colour))
    if channels == 3:
        ops.append(swap_red_green)
    return ops


def swap_red_green(image: Tensor) -> Tensor:
    """Exchange the first two channels of ``[..., 3, h, w]``."""
    return image[..., [1, 0, 2], :, :]


def make_queries(
    images: Tensor,
    predicted: Sequence[int],
    num_classes: int,
    settings: TransformSettings,
    generator: torch.Generator,
) -> Queries:
    """Build the queries of every affected input: itself, then its transforms.

    A transform pairs a changed image with a label drawn evenly from the classes other than
    the predicted one. The ablations change one of the two as the transform does, and keep the
    other.

    Args:
        images: The affected inputs, float32 ``[m, c, h, w]`` in [0, 1].
        predicted: The label the suspect model gave each.
        num_classes: Number of classes.
        settings: How many transforms.
        generator: The only source of randomness; torch's global generator is left alone.
    """
    count = settings.num_transforms
    seed = int(torch.randint(2**62, (), generator=generator))
    channels, height, width = images.shape[1:]
    ops = transforms((channels, height, width))
    changes = [0] + [1] * count + ([2] * count + [3] * count if settings.ablations else [])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changed = [_variants(image, ops, count) for image in images]
        drawn = [_labels(int(label), num_classes, count) for label in predicted]
    parts = [
        _assemble(*parts, ablations=settings.ablations)
        for parts in zip(images, predicted, changed, drawn, strict=True)
    ]
    return Queries(
        torch.cat([part[0] for part in parts]),
        torch.cat([part[1] for part in parts]),
        torch.arange(len(images)).repeat_interleave(len(changes)),
        torch.tensor(changes).repeat(len(images)),
    )


def _assemble(
    image: Tensor, label: int, changed: Tensor, drawn: Tensor, *, ablations: bool
) -> tuple[Tensor, Tensor]:
    """Line up the queries of one affected input: images ``[q, c, h, w]`` and labels ``[q]``."""
    count = len(changed)
    images, labels = [image[None], changed], [torch.tensor([label]), drawn]
    if ablations:
        images += [changed, image.expand_as(changed)]
        labels += [torch.full((count,), label), drawn]
    return torch.cat(images), torch.cat(labels)


def _variants(image: Tensor, ops: list[Transform], count: int) -> Tensor:
    """Stack `count` transforms of an image: ``[count, c, h, w]``."""
    chosen = torch.randint(len(ops), (count,)).tolist()
    return torch.stack([ops[index](image).clamp(0, 1) for index in chosen])


def _labels(predicted: int, num_classes: int, count: int) -> Tensor:
    """Draw `count` labels other than the predicted one evenly: int64 ``[count]``."""
    drawn = torch.randint(num_classes - 1, (count,))
    return drawn + (drawn >= predicted)
