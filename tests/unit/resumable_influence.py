"""Fit factors and scores slowly, saving after every batch; a test kills it at random moments."""

import sys
import time
from pathlib import Path

import numpy as np

import defense.checkpoints
from defense.influence.network import Network
from tests.conftest import make_images
from tests.unit.fits import fit, score, small_model

if __name__ == "__main__":
    scratch, result = map(Path, sys.argv[1:])
    defense.checkpoints.CHECKPOINT_SECONDS = 0.0
    original = Network.rows

    def slow(self, images, rows):
        time.sleep(0.05)
        return original(self, images, rows)

    Network.rows = slow
    model, images = small_model(), make_images(96, seed=4)
    scratch.mkdir(exist_ok=True)
    (scratch / "started").touch()
    factors = fit(model, images, scratch)
    influence = score(model, factors, images, scratch)
    np.savez(result, **vars(influence))
