"""Frequency detector: a network that knows triggers by their spectrum (Zeng et al. 2021; 3.3)."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.fft import dct
from torch import Tensor, nn

from defense.detectors.candidates import RowDetector
from defense.detectors.corruptions import corrupt
from defense.errors import DataError
from defense.phases import Phase
from defense.prediction import logits
from defense.recipe import Recipe
from defense.records import Case, Flags, ImageSet, image_set
from defense.training import train

WIDTHS = (32, 64, 128)
DROPOUTS = (0.2, 0.3, 0.4)
SMALLEST = 2 ** len(WIDTHS)  # pixels that three poolings leave one of


class FrequencyDetector(RowDetector):
    """Flag images that a network takes for corrupted, from their cosine transform.

    The network is trained on clean images and as many crudely corrupted copies: a rectangle of
    white or of noise in a corner, bright noise, a shadow, another image. It sees neither labels
    nor the suspect model.

    Attributes:
        clean: The clean images: those of the test set, or the suspect train set, poison and all,
            as if it were clean. The source takes the train set before the attack.
        num_images: Images it is trained on, and as many corrupted copies; None takes all.
        epochs: Passes over them; 10 in the Delta-Influence authors' code.
        batch_size: Images per step.
        learning_rate: Of Adadelta; 0.05 in the source.
        probability: A row is flagged above this probability of being corrupted.
    """

    name: Literal["frequency"] = "frequency"
    clean: Literal["test", "train"] = "test"
    num_images: int | None = Field(None, gt=1)
    epochs: int = Field(10, gt=0)
    batch_size: int = Field(256, gt=1)
    learning_rate: float = Field(0.05, gt=0)
    probability: float = Field(0.5, gt=0, lt=1)

    def detect(self, case: Case, generator: torch.Generator, scratch: Path | None = None) -> Flags:
        """See `Detector.detect`; suspicion is the log-odds of being corrupted.

        Raises:
            DataError: Images are too small, or there are no clean ones.
        """
        clean = case.controls if self.clean == "test" else case.train
        if clean is None:
            raise DataError("detector frequency: expected clean test images, got none")
        if min(case.train.shape[1:]) < SMALLEST:
            raise DataError(
                f"detector frequency: expected images of at least {SMALLEST} pixels per side, got "
                f"{case.train.shape[1]}x{case.train.shape[2]}"
            )
        examples = self.examples(clean, generator)
        recipe = Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=1e-4,
            schedule="constant",
            optimizer="adadelta",
        )
        network = spectrum_network(examples, generator)
        label = "train frequency detector"
        trained = train(
            network, [Phase(examples, self.epochs)], recipe, generator, scratch=scratch, label=label
        )
        said = logits(trained.model, case.train, label="frequency detector").numpy()
        return self.flags(
            case, said[:, 1] - said[:, 0], np.log(self.probability / (1 - self.probability))
        )

    def examples(self, images: ImageSet, generator: torch.Generator) -> ImageSet:
        """Build the training set: clean images under label 0, corrupted copies under 1."""
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        by_id = np.argsort(images.ids)  # so that the answer does not depend on the rows' order
        clean = images.uint8(rng.permutation(by_id)[: self.num_images])
        pixels = np.concatenate([clean, corrupt(clean, rng)])
        labels = np.repeat(np.arange(2), len(clean))
        ids = np.array([f"{number}" for number in range(len(pixels))])
        return image_set(pixels, labels, ids, ("clean", "corrupted"))


class Spectrum(nn.Module):
    """Orthonormal type-II cosine transform of every channel, standardised per coefficient."""

    rows: Tensor
    columns: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, int, int]) -> None:
        """Start without standardisation."""
        super().__init__()
        for name, side in (("rows", shape[1]), ("columns", shape[2])):
            basis: NDArray[np.float32] = dct(np.eye(side), axis=0, norm="ortho")
            self.register_buffer(name, torch.from_numpy(basis).float())
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[n, c, h, w]`` to coefficients of the same shape."""
        coefficients = self.rows @ images @ self.columns.T
        return (coefficients - self.mean) / self.std


def spectrum_network(examples: ImageSet, generator: torch.Generator) -> nn.Module:
    """Build the source's network for images like the examples, standardised on them."""
    spectrum = Spectrum(examples.shape)
    order = torch.randperm(len(examples), generator=generator)[:5000].numpy()
    coefficients = spectrum(examples.images(order))
    spectrum.mean.copy_(coefficients.mean(0))
    spectrum.std.copy_(coefficients.std(0).clamp_min(1e-4))
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [spectrum]
        inner = examples.shape[0]
        for width, dropout in zip(WIDTHS, DROPOUTS, strict=True):
            for channels in (inner, width):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ELU()]
                layers += [nn.BatchNorm2d(width)]
            layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
            inner = width
        layers += [nn.Flatten(), nn.LazyLinear(2)]
        network = nn.Sequential(*layers).eval()
        network(torch.zeros(1, *examples.shape))
    return network
