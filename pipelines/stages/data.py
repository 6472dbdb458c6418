"""Load the data and keep them as memory-mapped artefacts."""

from defense.artifacts import write_json
from defense.compute import seeded
from defense.storage import save_images
from pipelines.params import Params
from pipelines.paths import Paths


def run(params: Params, paths: Paths) -> str:
    """Write the clean train and test sets."""
    split = params.data.load(seeded(params.seed, "data"))
    save_images(paths.clean_train, split.train)
    save_images(paths.test, split.test)
    counts = {"num_train": len(split.train), "num_test": len(split.test)}
    write_json(paths.metrics("data"), counts | {"num_classes": split.train.num_classes})
    return f"{len(split.train):,} train and {len(split.test):,} test images"
