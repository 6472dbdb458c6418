"""Bring a model that was trained elsewhere, its data and what it got wrong to the stages.

``python -m pipelines.adopt --weights model.pt --affected <folder>`` in a folder of its own, with a
params.yaml, writes the training set, the test set, the model and the affected inputs as artefacts,
which the stages from ``factors`` to ``remediate`` and ``defense scan`` read.
"""

import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from defense.compute import seeded
from defense.datasets.folder import read_images
from defense.errors import DataError, DefenseError
from defense.influence.layers import find_layers
from defense.models.assemble import build_model
from defense.prediction import predict
from defense.records import ImageSet
from defense.storage import save_images, save_model
from pipelines.params import Params, read_params
from pipelines.paths import PARAMS, Paths


class Numbers(click.ParamType):
    """A number for every channel, with commas between them."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read ``0.49,0.48,0.45`` as a tensor ``[c, 1, 1]``."""
        try:
            return torch.tensor([float(part) for part in str(value).split(",")])[:, None, None]
        except ValueError:
            self.fail(f"expected numbers with commas between them, got {value!r}", param, ctx)


@click.command()
@click.option("--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              required=True, help="State dictionary, .pt or .safetensors.")  # fmt: skip
@click.option("--mean", type=Numbers(), help="What it subtracts from pixels in [0, 1], by channel.")
@click.option("--std", type=Numbers(), help="What it divides them by then.")
@click.option("--affected", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Folder of images that it gets wrong.")  # fmt: skip
def main(weights: Path, mean: Tensor | None, std: Tensor | None, affected: Path | None) -> None:
    """Write the artefacts of a model that was trained elsewhere into the current folder.

    The training set is the one in section `data` of params.yaml, as it was trained on.
    """
    logging.basicConfig(format="%(message)s")
    try:
        click.echo(adopt(read_params(PARAMS), weights, mean, std, affected))
    except DefenseError as error:
        click.echo(f"error: adopt: {error}", err=True)
        sys.exit(2)


def adopt(
    params: Params,
    weights: Path,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    affected: Path | None = None,
) -> str:
    """Write what was brought as artefacts of the current folder; say what the model is worth.

    Args:
        params: Of which data, model and seed are used, and what of it factors leave out.
        weights: State dictionary of the network that `params.model` builds.
        mean: Channel means of pixels in [0, 1], ``[c, 1, 1]``; zero if None.
        std: Channel deviations; one if None.
        affected: Folder of images that the model gets wrong, if any.

    Raises:
        DefenseError: The folder is one of a pipeline, whose stages would replace what is brought;
            rows would be left out; the weights are not those of the network; the model cannot be
            traced. What was brought before stays then.
    """
    refuse_to_lose(params)
    split = params.data.load(seeded(params.seed, "data"))
    train = split.train
    model = assembled(params, train, mean, std)
    read_weights(weights, model)
    find_layers(model, params.factors.exclude)
    found = None if affected is None else labelled(read_images(affected, train.shape), model, train)
    right, of_test = ((predict(model, part) == part.labels).mean() for part in (train, split.test))
    paths = Paths()
    save_images(paths.test, split.test)
    inputs = {"poisoned_train": save_images(paths.poisoned_train, train)}
    suspect = save_model(paths.suspect, model, meta={"gradient_samples": 0}, inputs=inputs)
    said = (
        f"{right:.1%} of {len(train):,} training rows and {of_test:.1%} of {len(split.test):,} "
        f"test images get their label; classes in order: {', '.join(train.class_names)}"
    )
    if found is None:
        if paths.affected.exists():  # they are of another model
            shutil.rmtree(paths.affected)
        return said
    save_images(paths.affected, found, inputs={"suspect": suspect})
    first = train.class_names[found.labels[0]]
    return f"{said}; affected inputs: {len(found):,}, the first, {found.ids[0]}, taken for {first}"


def refuse_to_lose(params: Params) -> None:
    """Refuse where stages would replace the model, or would not see all of its rows.

    Raises:
        DefenseError: They would.
    """
    if Path("dvc.yaml").exists():
        raise DefenseError(
            "expected a folder of its own, got one with a dvc.yaml: dvc repro would train another "
            "model in the place of yours; copy params.yaml elsewhere and run this there"
        )
    if (size := getattr(params.data, "train_size", None)) is not None:
        raise DefenseError(
            f"expected all rows the model was trained on, got {size:,} drawn from them: remove "
            "data.train_size"
        )


def assembled(
    params: Params, train: ImageSet, mean: Tensor | None, std: Tensor | None
) -> nn.Module:
    """Build the model for images like those it was trained on, without its weights.

    Raises:
        DataError: There is not one mean and deviation for every channel.
    """
    channels = train.shape[0]
    mean = torch.zeros(channels, 1, 1) if mean is None else mean
    std = torch.ones(channels, 1, 1) if std is None else std
    finite = bool(mean.isfinite().all() and std.isfinite().all() and (std > 0).all())
    if not len(mean) == len(std) == channels or not finite:
        raise DataError(
            f"expected a finite mean and a deviation above zero for each of {channels} channels, "
            f"got {mean.flatten().tolist()} and {std.flatten().tolist()}: give --mean and --std "
            "as the model was trained with"
        )
    generator = seeded(params.seed, "placeholder")  # the weights are replaced at once
    return build_model(params.model, train.shape, train.num_classes, generator, (mean, std))


def read_weights(path: Path, model: nn.Module) -> None:
    """Load a state dictionary into the network of a model.

    Raises:
        DataError: It cannot be read, is not one of this network, or is not finite.
    """
    network = model.get_submodule("network")
    try:
        if path.suffix == ".safetensors":
            values = load_file(path)
        else:
            values = torch.load(path, map_location="cpu", weights_only=True)
        missing, unknown = network.load_state_dict(values, strict=False)
    except Exception as error:  # a file of any content raises anything; it is told in one line
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"expected in {path} the state_dict of the network that section model of params.yaml "
            f"builds, got: {reason}"
        ) from error
    if missing or unknown:
        raise DataError(
            f"expected in {path} the state_dict of the network that section model of params.yaml "
            f"builds, got {len(missing)} names too few, such as {missing[:1]}, and "
            f"{len(unknown)} it does not have, such as {unknown[:1]}: save it without a wrapper"
        )
    if not all(bool(value.isfinite().all()) for value in network.state_dict().values()):
        raise DataError(f"expected finite weights in {path}, got some that are not")


def labelled(images: ImageSet, model: nn.Module, train: ImageSet) -> ImageSet:
    """Label images as a model takes them."""
    known = replace(images, class_names=train.class_names)
    return replace(known, labels=predict(model, known, label="affected"))


if __name__ == "__main__":
    main()
