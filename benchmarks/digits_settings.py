"""Choose what the digits pipeline leaves open, on seeds that no reported figure uses.

The threshold of Delta-Influence and the learning rate of fine-tuning: seeds 100 to 107, against
0 to 4 in `benchmarks.main_job`. Run ``python -m benchmarks.digits_settings`` in a clean clone.
"""

import os
from pathlib import Path
from typing import Any

import click

from benchmarks.main_job import ROOT, clone, run, set_seed
from benchmarks.record import RESULTS, hardware
from defense.artifacts import write_json
from defense.compute import seeded
from defense.contracts import Repair
from defense.detectors.delta_influence import DeltaInfluence
from defense.metrics import detection_quality
from defense.prediction import predict
from defense.records import Case
from defense.storage import load_images, load_scores, load_truth
from defense.unlearning.fine_tuning import CatastrophicForgetting
from defense.victim import make_trainer
from pipelines.params import Params, read_params
from pipelines.stages.common import load_model

SEEDS = range(100, 108)
THRESHOLDS = (0.0, -1.0, -5.0, -10.0, -40.0, -100.0)  # the paper's, and its notebook's -40
RATES = (1.0, 2.0, 4.0)  # of the original peak


def thresholds(home: Path) -> dict[str, Any]:
    """TPR and precision of the restricted rule by threshold, for the run in a folder."""
    train, _ = load_images(home / "artifacts" / "poisoned_train")
    truth, _ = load_truth(home / "artifacts" / "truth")
    (queries, scores), _ = load_scores(home / "artifacts" / "scores")
    model, _ = load_model(home / "artifacts" / "suspect", read_params(home / "params.yaml"), train)
    found = {}
    for tau in THRESHOLDS:
        case = Case(train, model, queries, scores)
        flags = DeltaInfluence(tau=tau).detect(case, seeded(0, "detect"))
        quality = detection_quality(flags, truth)[0]
        found[f"{tau:g}"] = {"tpr": quality.tpr.value, "precision": quality.precision.value}
    return found


def fine_tuning(home: Path, params: Params) -> dict[str, Any]:
    """PSR and accuracy of fine-tuning on everything but the poison, by learning rate."""
    train, _ = load_images(home / "artifacts" / "poisoned_train")
    probe, _ = load_images(home / "artifacts" / "probe")
    test, _ = load_images(home / "artifacts" / "test")
    truth, _ = load_truth(home / "artifacts" / "truth")
    affected, _ = load_images(home / "artifacts" / "affected")
    model, _ = load_model(home / "artifacts" / "suspect", params, train)
    trainer = make_trainer(params.model, params.train, seed=params.seed, stream="cf", scratch=None)
    found = {}
    for factor in RATES:
        method = CatastrophicForgetting(learning_rate=factor * params.train.learning_rate)
        forget, retain = train.where(truth.poisoned), train.where(~truth.poisoned)
        done = method.unlearn(Repair(model, forget, retain, affected), trainer).model
        psr = float((predict(done, probe) == probe.labels).mean())
        accuracy = float((predict(done, test) == test.labels).mean())
        found[f"{factor:g}"] = {"psr": psr, "accuracy": accuracy}
    return found


@click.command()
@click.option("--work", default=ROOT / "scratch" / "settings", type=click.Path(path_type=Path))
def main(work: Path) -> None:
    """Sweep both settings and write benchmarks/results/digits_settings.json."""
    work.mkdir(parents=True, exist_ok=True)
    home, runs = clone(work / "digits"), []
    for seed in SEEDS:
        set_seed(home / "params.yaml", seed)
        run(["dvc", "repro", "influence"], home, home)
        params = read_params(home / "params.yaml")
        swept = {"tau": thresholds(home), "cf_rate": fine_tuning(home, params)}
        runs.append({"seed": seed, **swept})
        print(seed, swept, flush=True)
    settings = {"command": "python -m benchmarks.digits_settings", "hardware": hardware()}
    write_json(RESULTS / "digits_settings.json", settings | {"runs": runs})


if __name__ == "__main__":
    os.environ.setdefault("DEFENSE_DEVICE", "cpu")
    main()
