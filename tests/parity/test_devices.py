"""What needs a CUDA device: the same numbers as on the CPU."""

import numpy as np
import pytest
import torch

from tests.conftest import make_images
from tests.unit.fits import fit, score, small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("tier", ["exact", "fast"])
def test_scores_do_not_depend_on_the_device(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = small_model(), make_images(96, seed=4)
    results = []
    for device in ("cpu", "cuda"):
        monkeypatch.setenv("DEFENSE_DEVICE", device)
        factors = fit(model, images, None, tier=tier, fisher="empirical")
        results.append(score(model, factors, images, None))
    cpu, cuda = (result.cosine() for result in results)
    assert np.corrcoef(cpu.ravel(), cuda.ravel())[0, 1] > 0.999
