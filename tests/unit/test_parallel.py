"""Several cells of the matrix at once: in what order, and what is left to run."""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest

from benchmarks.paper_cells import HOME
from benchmarks.parallel import Job, Jobs, chosen, current, matrix, run_all, run_one
from pipelines.matrix import read_cell, settings_of

CHAIN = {
    "data cifar10/1",
    "poison cifar10/1/badnets",
    "train cifar10/1/badnets",
    "factors cifar10/1/badnets",
}


def test_what_a_cell_needs_comes_before_it() -> None:
    jobs = matrix()
    plan = chosen(jobs, [("audit", "cifar10/1/badnets/truth/*"), ("detect", "cifar10/1/*/ekfac")])
    seen = set[str]()
    for name, job in plan.items():
        assert seen.issuperset(job.needs), name
        seen.add(name)
    assert seen >= CHAIN
    assert "reference cifar10/1/badnets/truth" in seen
    assert sum(name.startswith("audit") for name in seen) == 13
    assert sum(name.startswith("detect") for name in seen) == 3
    assert not any("cifar10/0" in name for name in seen)


def test_a_cell_that_is_not_in_the_matrix_is_refused() -> None:
    with pytest.raises(click.UsageError, match="no cell cifar10/1"):
        chosen(matrix(), [("audit", "cifar10/1")])


def line(*names: str) -> Jobs:
    """Jobs each of which needs the one before."""
    needs = [(), *((name,) for name in names)]
    return {name: Job(*name.split(), needs=need) for name, need in zip(names, needs, strict=False)}


def test_a_job_runs_after_its_needs_and_not_if_these_failed() -> None:
    plan = line("data a", "poison a", "train a") | line("data b", "poison b", "train b")
    order, done = [], {"data b"}

    def work(stage: str, cell: str) -> str | None:
        time.sleep(0.02 if cell == "a" else 0)
        order.append(f"{stage} {cell}")
        return "broken" if (stage, cell) == ("poison", "b") else None

    with ThreadPoolExecutor(2) as pool:
        failed = run_all(plan, done, pool, 2, work, time.time() + 60)
    assert failed == {"poison b": "broken"}
    assert done == {"data a", "poison a", "train a", "data b"}
    assert [name for name in order if name.endswith("a")] == ["data a", "poison a", "train a"]
    assert "train b" not in order
    assert "data b" not in order


def test_nothing_is_begun_after_the_time_given() -> None:
    with ThreadPoolExecutor(1) as pool:
        done = set[str]()
        assert run_all(line("data a"), done, pool, 1, lambda *_: None, time.time() - 1) == {}
    assert done == set()


def test_what_ran_with_the_parameters_of_today_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.parallel.HOME", tmp_path)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(HOME / name, tmp_path)
    plan = chosen(matrix(), [("factors", "cifar10/1/badnets")])
    assert set(plan) == CHAIN
    for age, job in enumerate(reversed(plan.values())):
        job.note.parent.mkdir(parents=True, exist_ok=True)
        found = settings_of(*read_cell(tmp_path / "params.yaml", job.cell, job.stage), job.stage)
        job.note.write_text(json.dumps({"settings": found}))
        os.utime(job.note, (1e9 - age, 1e9 - age))
    assert current(plan) == CHAIN
    poison = plan["poison cifar10/1/badnets"]
    os.utime(poison.note)  # ran again
    assert current(plan) == {"data cifar10/1", poison.name}
    params = tmp_path / "params.yaml"
    params.write_text(params.read_text().replace("train_size: 10000", "train_size: 9000"))
    assert current(plan) == set()


def test_an_error_is_told_and_not_raised() -> None:
    """The process goes on with the next job."""
    assert run_one("train", "cifar10/1/badnets")
    told = run_one("model", "badnets_1-100")
    assert told is not None
    assert "settings were chosen on seeds" in told
