"""Poison Forensics: prune innocent clusters until the guilty are left (Shan et al. 2022)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F

from defense.detectors.candidates import RowDetector
from defense.phases import Phase
from defense.prediction import features, logits
from defense.recipe import Recipe
from defense.records import Case, Flags, ImageSet, Mask
from defense.training import train

COORDINATES = 5000  # of the last layer's gradient that are clustered
MIN_ROWS = 4  # a cluster of fewer rows is not split


class PoisonForensics(RowDetector):
    """Split the rows in two, drop a half whose unlearning leaves the incident as it is, repeat.

    Rows are clustered by the last layer's gradient towards an even output, which needs no
    label. A half is unlearned by a short fine-tuning towards an even output on it and towards
    the labels on the rest; if the loss of the affected inputs under their predicted labels does
    not rise, the half is innocent. A row's suspicion is the number of rounds it survived.

    Attributes:
        affected: Use only the first so many affected inputs; None uses all.
        rounds: Largest number of splits.
        steps: Fine-tuning steps per unlearning; at least 100 in the source.
        batch_size: Rows per step, one half of them from the cluster.
        learning_rate: Of SGD; 0.008 in the source.
        rise: Smallest rise of the incident's loss that makes a cluster guilty; 0.01 in the source.
    """

    name: Literal["poison_forensics"] = "poison_forensics"
    affected: int | None = Field(None, gt=0)
    rounds: int = Field(12, gt=0)
    steps: int = Field(100, gt=0)
    batch_size: int = Field(128, gt=1)
    learning_rate: float = Field(0.008, gt=0)
    rise: float = Field(0.01, ge=0)

    def detect(self, case: Case, generator: torch.Generator, scratch: Path | None = None) -> Flags:
        """See `Detector.detect`; nothing is flagged if the first split shows no innocent half."""
        directions = even_gradients(case, generator)
        inquiry = Inquiry(self, case, incident(case, self.affected), scratch)
        order = np.argsort(case.train.ids)  # the answer must not depend on the rows' order
        suspects = np.ones(len(case.train), dtype=np.bool_)
        survived = np.zeros(len(suspects), dtype=np.float32)
        rounds = 0
        while rounds < self.rounds and suspects.sum() >= MIN_ROWS:
            halves = _halves(directions, suspects, order, generator)
            guilty = [half for half in halves if inquiry.is_guilty(half, generator)]
            if len(guilty) != 1:
                break
            suspects, rounds = guilty[0], rounds + 1
            survived[suspects] += 1
        return self.flags(case, survived, max(rounds, 1) - 0.5)


def incident(case: Case, count: int | None) -> ImageSet:
    """Collect the first affected inputs, or all, under their predicted labels."""
    chosen = np.flatnonzero(case.queries.changed("none"))[:count]
    pixels = (255 * case.queries.images[torch.from_numpy(chosen)]).round().to(torch.uint8).numpy()
    labels = case.queries.labels.numpy()[chosen]
    names = case.train.class_names
    return ImageSet(
        pixels, labels, np.arange(len(labels)).astype(np.str_), names, np.arange(len(labels))
    )


def even_gradients(case: Case, generator: torch.Generator) -> NDArray[np.float32]:
    """Compute the last layer's gradient towards an even output, normalised: ``[n, d]``.

    Of more than 5,000 coordinates as many are drawn.
    """
    seen = features(case.model, case.train)
    error = logits(case.model, case.train).softmax(1) - 1 / case.train.num_classes
    width = error.shape[1] * seen.shape[1]
    drawn = torch.randperm(width, generator=generator)[:COORDINATES]
    gradient = error[:, drawn // seen.shape[1]] * seen[:, drawn % seen.shape[1]]
    rows: NDArray[np.float32] = F.normalize(gradient, dim=1).numpy()
    return rows


def _halves(
    directions: NDArray[np.float32],
    suspects: Mask,
    order: NDArray[np.int64],
    generator: torch.Generator,
) -> list[Mask]:
    """Split the suspects by 2-means."""
    rows = order[suspects[order]]
    seed = int(torch.randint(2**31, (), generator=generator))
    labels = KMeans(2, n_init=10, random_state=seed).fit(directions[rows]).labels_
    halves = []
    for number in range(2):
        half = np.zeros_like(suspects)
        half[rows[labels == number]] = True
        halves.append(half)
    return [half for half in halves if half.any()]


@dataclass(frozen=True)
class Inquiry:
    """What unlearning a cluster does to the incident."""

    settings: PoisonForensics
    case: Case
    incident: ImageSet
    scratch: Path | None

    def loss(self, model: nn.Module) -> float:
        """Evaluate the cross-entropy of the incident under the predicted labels."""
        said = logits(model, self.incident)
        return float(F.cross_entropy(said, self.incident.targets()))

    def is_guilty(self, cluster: Mask, generator: torch.Generator) -> bool:
        """Tell whether unlearning a cluster makes the incident less likely."""
        settings = self.settings
        drawn, even = self.sample(cluster, generator)
        flat = torch.from_numpy(even)

        def objective(model: nn.Module, batch: Tensor, rows: NDArray[np.int64]) -> Tensor:
            said = model(batch).float().log_softmax(1)
            towards = -said.gather(1, drawn.targets(rows)[:, None].to(said.device))[:, 0]
            return torch.where(flat[rows].to(said.device), -said.mean(1), towards).mean()

        recipe = Recipe(
            epochs=1,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            schedule="constant",
            clip_norm=0.05,
        )
        name = f"even output on {even.tobytes().hex()[:64]}"
        phase = Phase(drawn, 1, objective, name)
        label = f"unlearn {cluster.sum():,} rows"
        tuned = train(
            self.case.model, [phase], recipe, generator, scratch=self.scratch, label=label
        )
        return self.loss(tuned.model) - self.loss(self.case.model) > settings.rise

    def sample(
        self, cluster: Mask, generator: torch.Generator
    ) -> tuple[ImageSet, NDArray[np.bool_]]:
        """Draw the rows of all steps, half from the cluster; with where those lie: ``[m]``."""
        images = self.case.train
        order = np.argsort(images.ids)
        parts = []
        for group in (cluster, ~cluster):
            rows = order[group[order]]
            want = self.settings.steps * self.settings.batch_size // 2
            if len(rows):
                fresh = torch.randperm(len(rows), generator=generator).numpy()
                parts.append(np.resize(rows[fresh], want))
        chosen = np.concatenate(parts)
        names = np.array([f"{number}" for number in range(len(chosen))])
        picked = replace(images, labels=images.labels[chosen], ids=names, rows=images.rows[chosen])
        return picked, cluster[chosen]
