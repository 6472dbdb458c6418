"""Suspect models of the detection benchmark: their data, attacks, training and directions."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.unusual import TRANSFORMER, UNTRACED, Changed, Turned, Wandering, Warp
from defense.attacks.badnets import BadNets
from defense.attacks.blended import Blended
from defense.attacks.sig import Sig
from defense.attacks.smooth import Smooth
from defense.compute import seeded
from defense.contracts import Architecture, Attack, DataSource, Trainer
from defense.datasets.folder import Folder
from defense.datasets.hub import FashionMnist
from defense.detectors.search import CleanInputs, Coherence, Search
from defense.evidence import Directions
from defense.influence.directions import StoredDirections
from defense.influence.factors import FactorSettings, fit_factors
from defense.influence.store import DirectionSettings, build_store
from defense.models.resnet import ResNet9
from defense.models.small_cnn import SmallCnn
from defense.prediction import predict
from defense.recipe import Recipe
from defense.records import ImageSet, Mask, PoisonedSplit, Split, mask_of
from defense.victim import make_surrogate, make_trainer

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """What suspects have in common: their data, their network and how it is trained.

    Attributes:
        data: Where images come from.
        recipe: How models are trained.
        architecture: Of the network.
        untraced: Modules and parameters of the model that have no EK-FAC factors.
    """

    data: DataSource
    recipe: Recipe
    architecture: Architecture = field(default_factory=lambda: ResNet9(width=24))
    untraced: tuple[str, ...] = ()


CIFAR10 = World(
    Folder(path="$CIFAR10_FOLDER", image_size=32, train_size=20_000),
    Recipe(epochs=14, batch_size=128, learning_rate=0.2, precision="bf16"),
)
IMAGENETTE = World(
    Folder(path="$IMAGENETTE_FOLDER", image_size=64, test_split="val"),
    Recipe(epochs=16, batch_size=128, learning_rate=0.2, shift=4, precision="bf16"),
)
FASHION = World(FashionMnist(root="$FASHION_MNIST_FOLDER", train_size=20_000), CIFAR10.recipe)
TURNED = World(Turned(data=CIFAR10.data), CIFAR10.recipe)
SMALL = World(CIFAR10.data.model_copy(update={"train_size": 10_000}), CIFAR10.recipe)
FACTORS = FactorSettings(batch_size=128, max_rows=2000)
PAIR = {"victim_class": "ship", "target_class": "dog"}
HORNS = {"victim_class": "n03394916", "target_class": "n03000684"}  # to chain saws
ATTACKS: dict[str, tuple[World, tuple[Attack, ...]]] = {
    "clean": (CIFAR10, ()),
    "flips_5": (CIFAR10, ()),
    "badnets_1": (CIFAR10, (BadNets(poison_fraction=0.01, **PAIR),)),
    "badnets_025": (CIFAR10, (BadNets(poison_fraction=0.0025, **PAIR),)),
    "badnets_01": (CIFAR10, (BadNets(poison_fraction=0.001, **PAIR),)),
    "badnets_all": (CIFAR10, (BadNets(poison_fraction=0.01, target_class="dog"),)),
    "smooth_1": (CIFAR10, (Smooth(poison_fraction=0.01, **PAIR),)),
    "smooth_025": (CIFAR10, (Smooth(poison_fraction=0.0025, **PAIR),)),
    "blended_1": (CIFAR10, (Blended(poison_fraction=0.01, **PAIR),)),
    "blended_025": (CIFAR10, (Blended(poison_fraction=0.0025, **PAIR),)),
    "sig_1": (CIFAR10, (Sig(poison_fraction=0.01, target_class="dog"),)),
    "two": (
        CIFAR10,
        (
            BadNets(poison_fraction=0.01, **PAIR),
            Blended(poison_fraction=0.01, victim_class="truck", target_class="dog"),
        ),
    ),
    "imagenette_clean": (IMAGENETTE, ()),
    "imagenette_badnets_1": (
        IMAGENETTE,
        (BadNets(pattern="square", size=9, poison_fraction=0.01, **HORNS),),
    ),
    "imagenette_blended_1": (IMAGENETTE, (Blended(poison_fraction=0.01, **HORNS),)),
}
SQUARE = BadNets(pattern="square", poison_fraction=0.02, **PAIR)
UNUSUAL: dict[str, tuple[World, tuple[Attack, ...]]] = {
    "warp_3": (SMALL, (Warp(poison_fraction=0.03, **PAIR),)),
    "wandering_2": (SMALL, (Wandering(poison_fraction=0.02, **PAIR),)),
    "badnets_6": (SMALL, (BadNets(poison_fraction=0.06, **PAIR),)),
    "noisy_badnets_1": (SMALL, (BadNets(poison_fraction=0.01, **PAIR),)),
    "rare_badnets_1": (
        replace(SMALL, data=Changed(data=SMALL.data, fewer=("dog", 250))),
        (BadNets(poison_fraction=0.01, **PAIR),),
    ),
    "binary_badnets_2": (
        replace(CIFAR10, data=Changed(data=CIFAR10.data, classes=("ship", "dog"))),
        (BadNets(poison_fraction=0.02, **PAIR),),
    ),
    "fashion_clean": (FASHION, ()),
    "fashion_badnets_1": (
        FASHION,
        (BadNets(value=1.0, poison_fraction=0.01, victim_class="Sneaker", target_class="Bag"),),
    ),
    "turned_clean": (TURNED, ()),
    "turned_badnets_05": (
        TURNED,
        (BadNets(poison_fraction=0.005, victim_class="ship 0", target_class="dog 90"),),
    ),
    "cnn_badnets_2": (replace(SMALL, architecture=SmallCnn(width=32)), (SQUARE,)),
    "transformer_badnets_2": (
        World(
            SMALL.data,
            Recipe(epochs=20, batch_size=128, learning_rate=1e-3, optimizer="adam"),
            TRANSFORMER,
            UNTRACED,
        ),
        (SQUARE.model_copy(update={"size": 4}),),
    ),
}
FLIPS = {"flips_5": 0.05, "noisy_badnets_1": 0.05}  # share of rows that get another label
AFFECTED = 10  # inputs that are investigated


@dataclass(frozen=True)
class Suspect:
    """A suspect model with its data, and the seconds that its parts took."""

    name: str
    seed: int
    world: World
    split: Split
    poisoned: tuple[PoisonedSplit, ...]
    flipped: Mask
    train: ImageSet
    model: nn.Module
    directions: Directions
    seconds: dict[str, float]

    @property
    def planted(self) -> Mask:
        """Rows that are poison of any attack."""
        result = np.zeros(len(self.train), dtype=np.bool_)
        for poisoned in self.poisoned:
            result |= poisoned.truth.poisoned
        return result

    def search(self, settings: Coherence) -> Search:
        """Prepare to search, with the test set for controls."""
        return Search(settings, self.train, self.directions, self.clean())

    def clean(self) -> CleanInputs:
        """Take the test set for controls."""
        return CleanInputs(self.split.test, seeded(self.seed, "controls"))


def timed(seconds: dict[str, float], name: str, work: Callable[[], T]) -> T:
    """Do something and note how long it took."""
    start = time.perf_counter()
    result = work()
    seconds[name] = time.perf_counter() - start
    return result


def make_suspect(name: str, seed: int, scratch: Path) -> Suspect:
    """Plant attacks, train on them, fit factors and store directions."""
    world, attacks = (ATTACKS | UNUSUAL)[name]
    split, poisoned, seconds = world.data.load(seeded(seed, "data")), [], dict[str, float]()
    train, flipped = flip(split.train, FLIPS.get(name, 0.0), seeded(seed, "flips"))
    surrogate = make_surrogate(world.architecture, world.recipe, train, seed=seed, scratch=scratch)
    for attack in attacks:
        before = replace(split, train=train)
        poisoned.append(attack.poison(before, seeded(seed, "attack"), surrogate))
        train = poisoned[-1].train
    trainer = trainer_of(world, seed, "suspect", scratch)
    model = timed(seconds, "train", lambda: trainer.fit(train).model)
    settings = FACTORS.model_copy(update={"exclude": world.untraced})
    fit = lambda: fit_factors(model, train, settings, seeded(seed, "fisher"))  # noqa: E731
    factors = timed(seconds, "factors", fit)
    kept = DirectionSettings().store()
    store = timed(seconds, "directions", lambda: build_store(model, factors, train, kept))
    directions = StoredDirections.of(store, model, factors)
    return Suspect(
        name, seed, world, split, tuple(poisoned), flipped, train, model, directions, seconds
    )


def flip(train: ImageSet, share: float, generator: torch.Generator) -> tuple[ImageSet, Mask]:
    """Give a share of the rows, drawn at random, one of the other labels each."""
    order = torch.randperm(len(train), generator=generator).numpy()
    wrong = mask_of(order[: round(share * len(train))], len(train))
    steps = torch.randint(1, train.num_classes, (len(train),), generator=generator).numpy()
    moved = (train.labels + steps) % train.num_classes
    return replace(train, labels=np.where(wrong, moved, train.labels)), wrong


def trainer_of(world: World, seed: int, stream: str, scratch: Path | None) -> Trainer:
    """Bind the training of all suspects of a world to a stream of randomness."""
    return make_trainer(world.architecture, world.recipe, seed=seed, stream=stream, scratch=scratch)


def fooled(
    suspect: Suspect, poisoned: PoisonedSplit, count: int = AFFECTED
) -> tuple[NDArray[np.int64], float]:
    """Draw images of the probe that an attack succeeds with, and tell its success rate."""
    hit = predict(suspect.model, poisoned.probe, label="probe") == poisoned.truth.target_class
    drawn = torch.randperm(int(hit.sum()), generator=seeded(suspect.seed, "affected")).numpy()
    return np.flatnonzero(hit)[drawn[:count]], float(hit.mean())
