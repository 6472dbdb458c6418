"""Plant the attack."""

from defense.compute import seeded
from defense.records import Split
from defense.storage import load_images, save_images, save_truth
from defense.victim import make_surrogate
from pipelines.params import Params
from pipelines.paths import Paths


def run(params: Params, paths: Paths) -> str:
    """Write the poisoned train set, the probe and the truth."""
    clean, clean_manifest = load_images(paths.clean_train)
    test, test_manifest = load_images(paths.test)
    surrogate = make_surrogate(
        params.model, params.train, clean, seed=params.seed, scratch=paths.scratch("poison")
    )
    generator = seeded(params.seed, "attack")
    planted = params.attack.poison(Split(clean, test), generator, surrogate)
    origin = {"clean_train": clean_manifest.digest}
    dirty = save_images(paths.poisoned_train, planted.train, inputs=origin)
    probe = save_images(paths.probe, planted.probe, inputs={"test": test_manifest.digest})
    save_truth(paths.truth, planted.truth, inputs={"poisoned_train": dirty, "probe": probe})
    count = int(planted.truth.poisoned.sum())
    return f"{count:,} of {len(planted.train):,} rows poisoned, {len(planted.probe):,} probe images"
