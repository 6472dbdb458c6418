"""Poison Forensics: follow the clusters whose unlearning undoes the incident (Shan et al. 2022)."""

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from torch.nn import functional as F

from defense.detectors.candidates import RowDetector, narrowed
from defense.phases import Phase
from defense.prediction import features, logits
from defense.recipe import Recipe
from defense.records import Case, Flags, ImageSet, Mask, mask_of
from defense.training import all_but_last, train

COORDINATES = 50_000  # of the last layer's gradient that are clustered, at most
ENTRIES = 2**28  # of all rows, at most: fewer coordinates of more than 5,369 rows
BATCH = 1024  # rows whose gradients are computed together
CLIP = 0.05  # of the entries of the gradient
FORGOTTEN = 0.01  # accuracy on the cluster below which it is not unlearned further


class PoisonForensics(RowDetector):
    """Split the rows in two, drop a half whose unlearning leaves the incident as it is, repeat.

    Rows are clustered by the last layer's gradient towards an even output, which needs no
    label. A half is unlearned by training the last layer towards an even output on those of its
    rows that the model gets right, and towards the labels on other rows; if the loss of the
    affected inputs under their predicted labels does not rise, the half is innocent. A guilty
    half is split again; if both halves of a cluster are guilty, it is flagged; if none is, it is
    dropped. A row's suspicion is how many splits it survived, plus 1 if it is flagged.

    The source's code also mirrors images at random and stops early once a cluster is forgotten.

    Attributes:
        affected: Use only the first so many affected inputs; None uses all.
        rounds: Largest number of splits on the way to a row.
        min_steps: Fewest steps per unlearning; otherwise it takes three epochs of the cluster.
            40 in the source.
        batch_size: Rows of the cluster per step, on average, and of the others as many.
        learning_rate: Of SGD; 0.008 in the source.
        rise: Smallest rise of the incident's loss that makes a cluster guilty; 0.01 in the source.
    """

    name: Literal["poison_forensics"] = "poison_forensics"
    affected: int | None = Field(None, gt=0)
    rounds: int = Field(12, gt=0)
    min_steps: int = Field(40, gt=0)
    batch_size: int = Field(128, gt=1)
    learning_rate: float = Field(0.008, gt=0)
    rise: float = Field(0.01, ge=0)

    def detect(self, case: Case, generator: torch.Generator, scratch: Path | None = None) -> Flags:
        """See `Detector.detect`; where every split is guilty all rows are flagged."""
        case = narrowed(case, self.affected)
        order = np.argsort(case.train.ids)  # the answer must not depend on the rows' order
        directions = even_gradients(case, generator)
        inquiry = Inquiry(self, case, incident(case), scratch)
        levels = np.zeros(len(order), dtype=np.float32)
        flagged = np.zeros(len(order), dtype=np.bool_)
        queue = deque([(order, 0)])
        while queue:
            rows, depth = queue.pop()
            halves = _halves(rows, directions, generator) if depth < self.rounds else []
            guilty = [half for half in halves if inquiry.is_guilty(half, generator)]
            for half in guilty:
                levels[half] += 1
            if len(guilty) == len(halves):
                flagged[rows] = depth > 0 or bool(halves)
            else:
                queue.extend((half, depth + 1) for half in guilty)
        return self.flags(case, levels / (self.rounds + 1) + flagged, 1.0 - 1e-6)


def incident(case: Case) -> ImageSet:
    """Collect the affected inputs under their predicted labels."""
    chosen = case.queries.changed("none")
    images = case.queries.images[torch.from_numpy(chosen)]
    labels = case.queries.labels.numpy()[chosen]
    numbers = np.arange(len(labels))
    pixels = (255 * images).round().to(torch.uint8).numpy()
    return ImageSet(pixels, labels, numbers.astype(np.str_), case.train.class_names, numbers)


def even_gradients(case: Case, generator: torch.Generator) -> NDArray[np.float32]:
    """Compute the last layer's gradient towards an even output, normalised: ``[n, d]``.

    Of more than 50,000 coordinates as many are drawn, as in the source, or so many that all rows
    take no more than 1 GiB.
    """
    seen = features(case.model, case.train)
    error = logits(case.model, case.train).softmax(1) - 1 / case.train.num_classes
    width, count = seen.shape[1], min(COORDINATES, ENTRIES // len(seen))
    drawn = torch.randperm(error.shape[1] * width, generator=generator)[:count].sort().values
    gradient = torch.empty(len(seen), len(drawn))
    for rows in torch.arange(len(seen)).split(BATCH):
        product = error[rows][:, drawn // width] * seen[rows][:, drawn % width]
        gradient[rows] = F.normalize(product, dim=1)
    result: NDArray[np.float32] = gradient.numpy()
    return result


def _halves(
    rows: NDArray[np.int64], directions: NDArray[np.float32], generator: torch.Generator
) -> list[NDArray[np.int64]]:
    """Split some rows by 2-means; returns nothing if they cannot be split."""
    if len(rows) < 2:
        return []
    seed = int(torch.randint(2**31, (), generator=generator))
    labels = MiniBatchKMeans(2, n_init=3, random_state=seed).fit_predict(directions[rows])
    halves = [rows[labels == number] for number in range(2)]
    return halves if all(len(half) for half in halves) else []


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

    def is_guilty(self, cluster: NDArray[np.int64], generator: torch.Generator) -> bool:
        """Tell whether unlearning a cluster makes the incident less likely."""
        settings, model = self.settings, self.case.model
        drawn, inside = self.sample(cluster, generator)
        recipe = Recipe(
            epochs=1,
            batch_size=2 * settings.batch_size,
            learning_rate=settings.learning_rate,
            weight_decay=0.0,
            schedule="constant",
            clip_value=CLIP,
        )
        objective = Unlearning(drawn, torch.from_numpy(inside), settings.batch_size)
        phase = Phase(drawn, 1, objective, "even output on the first half")
        tuned = train(
            model,
            [phase],
            recipe,
            generator,
            frozen=all_but_last(model, 1),
            scratch=self.scratch,
            label=f"unlearn {len(cluster):,} rows",
        )
        return self.loss(tuned.model) - self.loss(model) > settings.rise

    def sample(
        self, cluster: NDArray[np.int64], generator: torch.Generator
    ) -> tuple[ImageSet, Mask]:
        """Draw the rows of all steps, half from the cluster; with where those lie: ``[m]``."""
        train_set, size = self.case.train, self.settings.batch_size
        count = size * max(self.settings.min_steps, 3 * (len(cluster) // size))
        inside = mask_of(cluster, len(train_set))
        order = np.argsort(train_set.ids)
        parts = []
        for rows in (order[inside[order]], order[~inside[order]]):
            mixed = torch.randperm(len(rows), generator=generator).numpy()
            parts.append(np.resize(rows[mixed], count if len(rows) else 0))
        chosen = np.concatenate(parts)
        return train_set.take(chosen), inside[chosen]


@dataclass(frozen=True)
class Unlearning:
    """The objective: an even output on the cluster, the labels on the rest."""

    images: ImageSet
    inside: Tensor
    weight: int

    def __call__(self, model: nn.Module, batch: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """See `defense.phases.Objective`."""
        said = model(batch).float()
        scores, labels = said.log_softmax(1), self.images.targets(rows).to(said.device)
        inside = self.inside[rows].to(said.device)
        right = inside & (said.argmax(1) == labels)
        towards = -scores.gather(1, labels[:, None])[:, 0]
        loss = towards[~inside].sum() / (~inside).sum().clamp(min=1)
        if right.sum() >= FORGOTTEN * inside.sum() and right.any():
            loss = loss - scores[right].mean()
        return loss * self.weight
