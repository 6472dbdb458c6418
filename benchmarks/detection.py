"""Detection beyond the paper on real images: investigations, alarms, scans without an incident.

``CIFAR10_FOLDER=<folder> python -m benchmarks.detection --attack badnets_1 --seeds 2-11`` trains a
suspect model per seed (20,000 rows, a narrow ResNet-9), measures it and keeps a small file per
model in the work folder; attacks on Imagenette take IMAGENETTE_FOLDER, on Fashion-MNIST
FASHION_MNIST_FOLDER (as torchvision lays it out). Each call adds all that is there to
benchmarks/results/detection.json and docs/detection.md. Settings were chosen on seeds 0, 100 and
101, some after a look at seed 1: these are refused here.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from torch import Tensor

from benchmarks.detection_page import page
from benchmarks.record import RESULTS, versions
from benchmarks.repairs import default_flags, quality, repaired
from benchmarks.suspects import ATTACKS, UNUSUAL, Suspect, fooled, make_suspect, timed
from benchmarks.tables import fill
from defense.artifacts import write_json
from defense.compute import runs_on, seeded
from defense.detectors.normalised_influence import NormalisedInfluence, together
from defense.detectors.search import Bench, CleanInputs, Search, Sighting, starts_of
from defense.detectors.subpopulation import Subpopulation, subpopulation
from defense.evidence import Scan
from defense.independent import independent_of
from defense.labels import doubt_labels
from defense.machine import hardware
from defense.prediction import logits, predict
from defense.records import Mask, PoisonedSplit, Truth
from defense.scan import Scanner, ScanSettings

ROOT = Path(__file__).parents[1]
COMMAND = "python -m benchmarks.detection --attack <attack> --seeds <seeds>"
CHOSEN = {0, 1, 100, 101}  # seeds that settings were chosen on
VERSION = 3  # of the detector; 2 had three rules more than 1, 3 the metric of clean inputs
INNOCENT = 60  # inputs that are investigated
SEVERAL = (1, 5, 10, 100)  # affected inputs of every attack, investigated together
RATES = (0.02, 0.05, 0.1)  # false-discovery rates


def measure(suspect: Suspect, *, repair: bool = False, alone: bool = False) -> dict[str, Any]:
    """Measure everything about one suspect.

    Args:
        suspect: The model and its data.
        repair: Remove what is flagged, too, and measure what is left of the attack.
        alone: Nothing else runs on the machine, so that times mean something.
    """
    test, train = suspect.split.test, suspect.train
    predicted = predict(suspect.model, test, label="test")
    whole = suspect.search(NormalisedInfluence())
    facts: dict[str, Any] = {
        "hardware": hardware()["processor"],
        **runs_on(),
        "version": VERSION,
        "attack": suspect.name,
        "seed": suspect.seed,
        "accuracy": float((predicted == test.labels).mean()),
        "planted": int(suspect.planted.sum()),
        "innocent": innocents(suspect, predicted),
        "classes": classes(whole, suspect.planted),
        "alone": alone,
    }
    if suspect.poisoned:
        facts |= investigations(suspect)
        facts |= {"repair": repaired(suspect)} if repair else {}
    facts |= {"labels": doubted(suspect)} if suspect.flipped.any() else {}
    settings = ScanSettings()
    recipe = suspect.world.recipe
    judge = independent_of(suspect.world.architecture, recipe, suspect.seed, None)
    scanner = Scanner(settings, train, suspect.directions, suspect.clean(), judge)
    rows = timed(suspect.seconds, "scan", lambda: scanner.rows(suspect.seed))
    scanner = Scanner(settings, train, suspect.directions, suspect.clean(), judge)
    look = lambda: scanner.inputs(test, predicted, suspect.seed)  # noqa: E731
    inputs = timed(suspect.seconds, "scan_inputs", look)
    facts |= {"scan": scanned(rows, suspect), "scan_inputs": scanned(inputs, suspect)}
    return facts | {
        "seconds": suspect.seconds | {"epoch": suspect.seconds["train"] / recipe.epochs}
    }


def investigations(suspect: Suspect) -> dict[str, Any]:
    """Investigate affected inputs of every attack one by one, at several false-discovery rates."""
    chosen, success = zip(
        *(fooled(suspect, poisoned) for poisoned in suspect.poisoned), strict=True
    )
    found: dict[str, Any] = {"psr": success, "investigations": {}}
    if not all(map(len, chosen)):
        return found
    first = [suspect.poisoned[0].probe.take(chosen[0][:1])]
    label = suspect.poisoned[0].truth.target_class
    timed(suspect.seconds, "investigation", lambda: default_flags(suspect, first, label))
    images = [
        attack.probe.images(own) for attack, own in zip(suspect.poisoned, chosen, strict=True)
    ]
    for rate in RATES:
        search, runs = suspect.search(NormalisedInfluence(false_discovery_rate=rate)), []
        for poisoned, own in zip(suspect.poisoned, images, strict=True):
            runs += investigated(search, suspect, poisoned, own)
        found["investigations"][f"{rate:g}"] = runs
    if len(images) > 1:
        found["apart"] = told_apart(suspect, images)
    return found | {"several": [several(suspect, count, label) for count in SEVERAL]}


def several(suspect: Suspect, count: int, label: int) -> dict[str, Any]:
    """Investigate several affected inputs of every attack together, or all, if they are fewer."""
    chosen = [poisoned.probe.take(fooled(suspect, poisoned, count)[0])
              for poisoned in suspect.poisoned]  # fmt: skip
    flags = default_flags(suspect, chosen, label)
    hits, flagged = int((flags.mask & suspect.planted).sum()), int(flags.mask.sum())
    return {
        "count": count,
        "inputs": sum(map(len, chosen)),
        "incidents": sum(bool(one.affected and one.num_flagged) for one in flags.incidents),
        "tpr": hits / int(suspect.planted.sum()),
        "precision": hits / flagged if flagged else None,
    }


def investigated(
    search: Search, suspect: Suspect, poisoned: PoisonedSplit, images: Tensor
) -> list[dict[str, Any]]:
    """Investigate affected inputs of one attack."""
    truth = poisoned.truth
    bench = search.bench(truth.target_class)
    starts = starts_of(bench.rows, images, truth.target_class)
    return [investigation(search, truth, start, bench, suspect.planted) for start in starts]


def told_apart(suspect: Suspect, chosen: Sequence[Tensor]) -> dict[str, int]:
    """Give inputs of all attacks at once; count incidents, and those that mix attacks."""
    owner = np.repeat(np.arange(len(chosen)), [len(images) for images in chosen])
    label = suspect.poisoned[0].truth.target_class
    search = suspect.search(NormalisedInfluence())
    bench = search.bench(label)
    starts = starts_of(bench.rows, torch.cat([*chosen]), label)
    groups = together([search.certain(label, start) for start in starts], bench.null)
    mixed = sum(len({*owner[group].tolist()}) > 1 for group in groups)
    return {"inputs": len(owner), "incidents": len(groups), "mixed": mixed}


def investigation(
    search: Search, truth: Truth, start: NDArray[np.float32], bench: Bench, planted: Mask
) -> dict[str, Any]:
    """Investigate one affected input, and compare what was found with the truth.

    Recall is of the attack it belongs to, precision of poison of any attack; rows of another
    attack are counted in the block that is found first.
    """
    alarm, flagged = search.settings.alarm, np.zeros(len(start), dtype=np.bool_)
    expected = np.zeros(3)
    seen = [*search.sightings(truth.target_class, start)]
    for sighting in seen:
        if sighting.found(alarm):
            flagged[sighting.among[sighting.finding.flagged]] = True
            expected += sighting.finding.expected_false
    own, any_attack = truth.poisoned[bench.rows.places], planted[bench.rows.places]
    hits, all_flags = int((flagged & any_attack).sum()), int(flagged.sum())
    first = seen[0].finding.flagged if seen[0].found(alarm) else np.zeros_like(flagged)
    return {
        "found": seen[0].found(alarm),
        "suspected": seen[0].hidden(alarm),
        "p_value": seen[0].p_value,
        "p_value_left": seen[-1].p_value if not seen[-1].found(alarm) and len(seen) > 1 else None,
        "flagged": all_flags,
        "tpr": float((flagged & own).sum() / truth.poisoned.sum()),
        "precision": hits / all_flags if all_flags else None,
        "of_another": int((first & any_attack & ~own).sum()),
        "inside": bool(expected[1] <= all_flags - hits <= expected[2]),
    }


def innocents(suspect: Suspect, predicted: NDArray[np.int64]) -> dict[str, int]:
    """Investigate test inputs that nobody attacked; count the alarms.

    Half of them are drawn among all inputs, half among those that the model gets wrong.
    """
    test, settings = suspect.split.test, NormalisedInfluence()
    order = torch.randperm(len(test), generator=seeded(suspect.seed, "innocent")).numpy()
    wrong = order[predicted[order] != test.labels[order]]
    chosen = np.unique(np.concatenate([order[: INNOCENT // 2], wrong[: INNOCENT // 2]]))
    others = np.setdiff1d(np.arange(len(test)), chosen)
    clean = CleanInputs(test.take(others), seeded(suspect.seed, "controls"))
    search = Search(settings, suspect.train, suspect.directions, clean)
    alarms = 0
    for label in np.unique(predicted[chosen]):
        own = chosen[predicted[chosen] == label]
        for start in starts_of(search.bench(int(label)).rows, test.images(own), int(label)):
            first: Sighting = next(iter(search.sightings(int(label), start)))
            alarms += first.p_value <= settings.alarm
    return {"inputs": len(chosen), "alarms": int(alarms)}


def classes(search: Search, planted: Mask) -> list[dict[str, Any]]:
    """Ask about classes as a whole, without explaining any row before; compare with the truth.

    Classes with fewer than 200 clean inputs or rows are left out.
    """
    labels = range(search.train.num_classes)
    asked = ((label, subpopulation(search, label, np.zeros_like(planted))) for label in labels)
    return [
        as_a_whole(label, seen, planted[search.train.labels == label].sum(), planted[seen.rows])
        for label, seen in asked
        if seen is not None
    ]


def as_a_whole(label: int, seen: Subpopulation, planted: int, poison: Mask) -> dict[str, Any]:
    """Compare what clean inputs of a class lack with what was planted in it.

    Args:
        label: The class.
        seen: What was found; `poison` tells which of its rows were planted.
        planted: Rows that were planted in the class.
        poison: See `seen`.
    """
    hits, all_flags = int(poison.sum()), len(seen.rows)
    low, high = seen.finding.expected_false[1:]
    return {
        "label": label,
        "planted": int(planted),
        "found": all_flags > 0,
        "flagged": all_flags,
        "hits": hits,
        "inside": bool(low <= all_flags - hits <= high) if all_flags else None,
    }


def doubted(suspect: Suspect) -> dict[str, float]:
    """Average precision of planted wrong labels in the list of doubtful ones, and in others."""
    train, directions, wrong = suspect.train, suspect.directions, suspect.flipped
    doubts = doubt_labels(suspect.model, train, directions, suspect.seed)
    chances = torch.softmax(logits(suspect.model, train).double(), dim=1)
    missing = 1 - chances.gather(1, train.targets()[:, None])[:, 0].numpy()
    lists = {
        "doubt": doubts.doubt,
        "loss": missing,  # the loss grows with it
        "self_influence": missing**2 * directions.self_influence,
    }
    true = suspect.split.train.labels
    return {name: float(average_precision_score(wrong, by)) for name, by in lists.items()} | {
        "fitted": float((chances.argmax(1).numpy() == train.labels)[wrong].mean()),
        "suggested": float((doubts.suggested == true)[wrong].mean()),
    }


def scanned(scan: Scan, suspect: Suspect) -> dict[str, Any]:
    """Compare what a scan suspects with the truth."""
    rows = np.zeros(len(suspect.train), dtype=np.bool_)
    for block in scan.suspected:
        rows |= block.rows
    hits = int((rows & suspect.planted).sum())
    keep = ("label", "coherence", "clean_coherence", "agreement", "usual_agreement", "p_value",
            "lacking")  # fmt: skip
    blocks = [
        {name: getattr(block, name) for name in (*keep, "suspected")}
        | {"rows": int(block.rows.sum()), "planted": int(suspect.planted[block.rows].sum())}
        for block in scan.blocks
    ]
    return {
        "alarm": bool(scan.suspected),
        "tpr": hits / suspect.planted.sum() if suspect.planted.any() else None,
        "precision": hits / int(rows.sum()) if rows.any() else None,
        "blocks": blocks,
        "pointed": len({given.id for given in scan.inputs if given.dictated}),
    }


def numbers(text: str) -> list[int]:
    """Read ``1-3,7`` as numbers."""
    parts = [part.split("-") for part in text.split(",")]
    return [n for part in parts for n in range(int(part[0]), int(part[-1]) + 1)]


@click.command()
@click.option("--attack", "names", multiple=True, type=click.Choice((*ATTACKS, *UNUSUAL)))
@click.option("--seeds", default="2-4", show_default=True, help="Such as 2-4,7.")
@click.option("--repair", is_flag=True, help="Measure repairs, too.")
@click.option("--alone", is_flag=True, help="Nothing else runs here: tell times.")
@click.option("--work", default=ROOT / "scratch" / "detection", type=click.Path(path_type=Path))
def main(names: tuple[str, ...], seeds: str, *, repair: bool, alone: bool, work: Path) -> None:
    """Measure what has not been measured, and write down all that was."""
    work.mkdir(parents=True, exist_ok=True)
    for seed in numbers(seeds):
        for name in names:
            measured(name, seed, work, repair=repair, alone=alone)
    collect(work)


def measured(name: str, seed: int, work: Path, *, repair: bool, alone: bool = False) -> None:
    """Measure of a model what has not been measured, and keep it in a file of its own.

    Raises:
        click.UsageError: Settings were chosen on the seed.
    """
    if seed in CHOSEN:
        raise click.UsageError(f"settings were chosen on seeds {sorted(CHOSEN)}: give others")
    file = work / f"{name}-{seed}-v{VERSION}.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    if known and (not repair or "psr" not in known or "repair" in known):
        return
    scratch = work / "scratch" / f"{name}-{seed}"
    resumed = scratch.is_dir()
    suspect = make_suspect(name, seed, scratch)
    if known:
        if (found := quality(suspect, suspect.model))["psr"] != known["psr"]:
            raise click.UsageError(
                f"{file} is of another model (PSR {known['psr']}, here {found['psr']}): delete it, "
                "or repair where it was trained"
            )
        facts = known | {"repair": repaired(suspect)}
    else:
        facts = measure(suspect, repair=repair, alone=alone)
        if resumed:  # its training says nothing of how long an epoch takes
            facts["seconds"]["epoch"] = None
    write_json(file, facts)
    print(json.dumps({k: facts[k] for k in facts if k != "investigations"}), flush=True)


def collect(work: Path) -> None:
    """Gather the files of all models into the results and the page."""
    known = RESULTS / "detection.json"
    models = json.loads(known.read_text())["models"] if known.is_file() else {}
    for file in sorted(work.glob("*-*-v*.json")):
        models[file.stem] = json.loads(file.read_text())
    write_json(known, {"command": COMMAND, "versions": versions(), "models": models})
    fill(ROOT / "docs" / "detection.md", page(models))


if __name__ == "__main__":
    os.environ.setdefault("DEFENSE_DEVICE", "cpu")
    main()
