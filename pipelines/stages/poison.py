"""Plant the attack."""

from defense.compute import seeded
from defense.records import Split
from defense.storage import load_images, save_images, save_truth
from pipelines import paths
from pipelines.params import Params


def run(params: Params) -> str:
    """Write the poisoned train set, the probe and the truth."""
    clean, clean_manifest = load_images(paths.CLEAN_TRAIN)
    test, test_manifest = load_images(paths.TEST)
    planted = params.attack.poison(Split(clean, test), seeded(params.seed, "attack"))
    origin = {"clean_train": clean_manifest.digest}
    dirty = save_images(paths.POISONED_TRAIN, planted.train, inputs=origin)
    probe = save_images(paths.PROBE, planted.probe, inputs={"test": test_manifest.digest})
    save_truth(paths.TRUTH, planted.truth, inputs={"poisoned_train": dirty, "probe": probe})
    count = int(planted.truth.poisoned.sum())
    return f"{count:,} of {len(planted.train):,} rows poisoned, {len(planted.probe):,} probe images"
