"""Killed fits and scores continue; other inputs, damaged and stale files never count."""

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from defense.checkpoints import Checkpoint
from defense.influence.eigen import eigenvectors
from defense.records import Factors, ImageSet
from defense.storage import save_factors
from tests.conftest import KilledError, make_images
from tests.unit.fits import fit, parts, score, small_model

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.unit.resumable_influence"]


def told(factors: Factors) -> tuple[int, float, float]:
    return factors.num_differentiated, factors.left_out, factors.error


@pytest.mark.parametrize("tier", ["exact", "fast"])
def test_a_fit_killed_at_any_batch_ends_with_the_same_bytes(tier, kill_after, tmp_path) -> None:
    model, images = small_model(), make_images(48, seed=4)
    whole = kill_after(None)
    undisturbed = fit(model, images, None, tier=tier)
    total = len(whole)
    assert total >= 1 + 2 * 48 // 8  # the forecast's rows, and at least two passes
    for count in range(1, total):
        scratch = tmp_path / str(count)
        kill_after(count)
        with pytest.raises(KilledError):
            fit(model, images, scratch, tier=tier)
        rest = kill_after(None)
        resumed = fit(model, images, scratch, tier=tier)
        assert parts(resumed) == parts(undisturbed)
        assert told(resumed) == told(undisturbed)
        # Again run the rows of check and forecast, a batch, and those the error rests on.
        assert len(rest) <= total - count + 4 + 4 * (tier == "fast")


@pytest.mark.parametrize("tier", ["exact", "fast"])
def test_a_fit_killed_between_eigenproblems_continues(tier, monkeypatch, tmp_path: Path) -> None:
    model, images = small_model(), make_images(48, seed=4)
    monkeypatch.setattr("defense.checkpoints.CHECKPOINT_SECONDS", 0.0)
    undisturbed = fit(model, images, None, tier=tier)
    solved: list[str] = []

    def solve(name: str, side: str, matrix: Tensor) -> Tensor:
        solved.append(f"{name}:{side}")
        if len(solved) == 3:
            raise KilledError
        return eigenvectors(name, side, matrix)

    monkeypatch.setattr("defense.influence.factors.eigenvectors", solve)
    with pytest.raises(KilledError):
        fit(model, images, tmp_path, tier=tier)
    resumed = fit(model, images, tmp_path, tier=tier)
    assert solved[2] == solved[3]
    assert len(solved) == 4 + 1  # two layers of two sides, and one of them twice
    assert parts(resumed) == parts(undisturbed)


def test_killed_scores_end_with_the_same_bytes(kill_after, tmp_path: Path) -> None:
    model, images = small_model(), make_images(48, seed=4)
    factors = fit(model, images, None)
    kill_after(None)
    undisturbed = score(model, factors, images, None)
    kill_after(4)
    with pytest.raises(KilledError):
        score(model, factors, images, tmp_path)
    rest = kill_after(None)
    resumed = score(model, factors, images, tmp_path)
    for one, other in zip(vars(resumed).values(), vars(undisturbed).values(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(rest) == 2 + 4  # the forecast's rows, twice, and the batches that were not done


def test_a_result_is_not_the_way_into_its_checkpoint(kill_after, tmp_path: Path) -> None:
    model, images = small_model(), make_images(48, seed=4)
    factors = fit(model, images, None)
    kill_after(None)
    first = score(model, factors, images, tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        first.margin[:] = 0
    again = score(model, factors, images, tmp_path)
    np.testing.assert_array_equal(again.margin, score(model, factors, images, None).margin)


@pytest.mark.parametrize("count", [4, 9, 16])
def test_killed_passes_over_groups_of_queries_continue(count, kill_after, monkeypatch, tmp_path):
    model, images = small_model(), make_images(48, seed=4)
    factors = fit(model, images, None)
    monkeypatch.setattr("defense.influence.forecast._passes", lambda *_: (3, 8))
    kill_after(None)
    undisturbed = score(model, factors, images, None)
    kill_after(count)
    with pytest.raises(KilledError):
        score(model, factors, images, tmp_path)
    monkeypatch.setattr("defense.influence.forecast._passes", lambda *_: (2, 16))
    kill_after(None)
    resumed = score(model, factors, images, tmp_path)  # on the plan it was begun with
    for one, other in zip(vars(resumed).values(), vars(undisturbed).values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_save_that_takes_long_comes_less_often(tmp_path: Path, monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    checkpoint = Checkpoint(tmp_path / "state.pt")
    assert checkpoint.due()
    for took, wait in ((0.5, 20.0), (4.0, 40.0), (60.0, 60.0)):
        checkpoint.saved, checkpoint.took = now[0], took
        now[0] += wait - 0.1
        assert not checkpoint.due()
        now[0] += 0.2
        assert checkpoint.due()


def test_a_checkpoint_of_anything_else_is_not_continued(kill_after, tmp_path: Path) -> None:
    model, images = small_model(), make_images(48, seed=4)
    kill_after(8)
    with pytest.raises(KilledError):
        fit(model, images, tmp_path)
    weights = small_model()
    with torch.no_grad():
        weights[0].bias[0] += 1e-3
    labels, pixels = images.labels.copy(), images.pixels.copy()
    labels[47] += 1
    pixels[47, 0, 0, 0] ^= 1
    for label, changed, kept, options in (
        ("weights", weights, images, {}),
        ("labels", model, ImageSet(images.pixels, labels, *list(vars(images).values())[2:]), {}),
        ("pixels", model, ImageSet(pixels, *list(vars(images).values())[1:]), {}),
        ("settings", model, images, {"tolerance": 0.01}),
    ):
        seen = kill_after(None)
        fit(changed, kept, tmp_path, **options)
        assert len(seen) > 12, label


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_checkpoint_is_rebuilt(keep: int, kill_after, tmp_path: Path) -> None:
    model, images = small_model(), make_images(48, seed=4)
    kill_after(9)
    with pytest.raises(KilledError):
        fit(model, images, tmp_path)
    (file,) = tmp_path.glob("*.pt")
    file.write_bytes(file.read_bytes()[:keep])
    kill_after(None)
    with pytest.warns(UserWarning, match="is damaged, starting again"):
        resumed = fit(model, images, tmp_path)
    assert parts(resumed) == parts(fit(model, images, None))


def test_a_checkpoint_with_a_flipped_bit_is_rebuilt(kill_after, tmp_path: Path) -> None:
    model, images = small_model(), make_images(48, seed=4)
    kill_after(9)
    with pytest.raises(KilledError):
        fit(model, images, tmp_path)
    (file,) = tmp_path.glob("*.pt")
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as members:
        largest = max(members.infolist(), key=lambda member: member.file_size)
    content[largest.header_offset + 100 + largest.file_size // 2] ^= 1
    file.write_bytes(content)
    kill_after(None)
    with pytest.warns(UserWarning, match="is damaged, starting again"):
        resumed = fit(model, images, tmp_path)
    assert parts(resumed) == parts(fit(model, images, None))


def test_a_kill_before_the_result_is_written_loses_no_more_than_any_other(
    kill_after, tmp_path: Path
) -> None:
    model, images = small_model(), make_images(48, seed=4)
    whole = kill_after(None)
    factors = fit(model, images, tmp_path)
    rest = kill_after(None)
    again = fit(model, images, tmp_path)
    assert parts(again) == parts(factors)
    assert len(whole) > 12
    assert len(rest) <= 3  # the rows of the check and, twice, of the forecast


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_scores_without_their_array_are_computed_again(damage, kill_after, tmp_path) -> None:
    model, images = small_model(), make_images(48, seed=4)
    factors = fit(model, images, None)
    kill_after(4)
    with pytest.raises(KilledError):
        score(model, factors, images, tmp_path)
    (file,) = tmp_path.glob("*.array")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8])
    rest = kill_after(None)
    again = score(model, factors, images, tmp_path)
    assert len(rest) == 2 + 6
    np.testing.assert_array_equal(again.margin, score(model, factors, images, None).margin)


def run_script(scratch: Path, result: Path, *, killed_after: float | None) -> float:
    """Run the script, killed so many seconds after it began to work; returns how long it took."""
    started = scratch / "started"
    started.unlink(missing_ok=True)
    process = subprocess.Popen([*COMMAND, str(scratch), str(result)], cwd=ROOT)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.005)
    begin = time.monotonic()
    if killed_after is None:
        assert process.wait() == 0
    else:
        time.sleep(killed_after)
        process.kill()
        process.wait()
    return time.monotonic() - begin


def test_sigkill_at_random_moments_gives_the_same_bytes(tmp_path: Path) -> None:
    whole, resumed, scratch = (tmp_path / name for name in ("whole.npz", "resumed.npz", "scratch"))
    length = run_script(tmp_path / "unused", whole, killed_after=None)
    for share in np.random.default_rng(0).uniform(0.05, 0.35, 5):
        run_script(scratch, resumed, killed_after=float(share) * length)
    assert list(scratch.glob("*.pt"))  # there is something to continue
    run_script(scratch, resumed, killed_after=None)
    with np.load(whole) as expected, np.load(resumed) as actual:
        assert expected.files == actual.files
        for name in expected.files:
            assert expected[name].tobytes() == actual[name].tobytes()


def test_factors_of_a_tier_are_saved_with_what_they_were_fitted_on(tmp_path: Path) -> None:
    model, images = small_model(), make_images(48, seed=4)
    factors = fit(model, images, None)
    save_factors(tmp_path / "factors", factors, inputs={})
    assert "fast tier, 2 layers with 97.89% of the parameters" in str(factors)
