"""The tables of the Delta-Influence paper from what ``pipelines/paper`` has run.

Run ``python -m benchmarks.tables`` after any part of
``dvc repro`` in pipelines/paper. It updates benchmarks/results/paper.json, the
pictures in docs/paper and the tables in docs/paper.md; what has not run is a dash.
"""

import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.paper_cells import STORE, Cells, gather, of_attack, values
from benchmarks.paper_drawings import draw
from defense.artifacts import write_json, write_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "paper.md"
COMMAND = "(cd pipelines/paper && dvc repro) && python -m benchmarks.tables"
ATTACKS = {"badnets": "BadNet", "smooth": "smooth trigger", "witches_brew": "Witches' Brew"}
DETECTORS = {
    "spectral_paper": "Spectral Signatures (`paper`)",
    "spectral_tran": "Spectral Signatures (`tran`)",
    "activation_clustering": "Activation Clustering",
    "frequency": "frequency detector",
    "poison_forensics": "Poison Forensics",
    "ekfac": "EK-FAC, largest 27 %",
    "ekfac_zero": "EK-FAC > 0",
    "delta_influence": "Delta-Influence, all rows",
    "delta_restricted": "Delta-Influence, rows labelled as predicted",
    "normalised": "normalised influence",
}
ABLATIONS = {
    "delta_influence": "image and label",
    "delta_image": "image only",
    "delta_label": "label only",
}
SEVERAL = {
    "ekfac": "EK-FAC, 1 input",
    "delta_influence": "Delta-Influence, 1 input",
    "ekfac_5": "EK-FAC, 5 inputs",
    "ekfac_boosted_5": "EK-FAC (boosted), 5 inputs",
    "delta_5": "Delta-Influence, 5 inputs",
    "ekfac_10": "EK-FAC, 10 inputs",
    "ekfac_boosted_10": "EK-FAC (boosted), 10 inputs",
    "delta_10": "Delta-Influence, 10 inputs",
}
UNLEARNERS = {
    "eu": "EU",
    "cf": "CF, a fifth of the epochs",
    "cf_full": "CF, all epochs",
    "cf_last": "CF, last 2 layers",
    "ssd": "SSD, batches",
    "ssd_sample": "SSD, single rows",
    "scrub": "SCRUB",
    "scrub_cmu": "SCRUB (`cmu`)",
    "scrub_paper": "SCRUB (the paper's run)",
    "badt": "BadT, one epoch",
    "badt_long": "BadT, five epochs",
    "potion": "Potion",
}
COUNTERFACTUALS = {
    "nothing": "nothing",
    "found": "flagged poison",
    "missed": "poison that is not flagged",
    "any_poison": "as much poison, at random",
    "clean": "as many clean rows of the target class",
}
# Precision / TPR in per cent: Table 1, and Table 4, which also has PSR and accuracy after EU; the
# body of Table 5 is not in the text at hand.
PUBLISHED = {
    ("cifar10", "badnets"): {
        "spectral_paper": "3.6 / 88.3",
        "activation_clustering": "2.2 / 94.9",
        "frequency": "8.0 / 72.3",
        "ekfac": "2.8 / 67.1",
        "delta_influence": "17.6 / 99.1",
    },
    ("cifar10", "smooth"): {
        "spectral_paper": "1.3 / 88.3",
        "activation_clustering": "2.2 / 99.1",
        "frequency": "0.4 / 3.2",
        "ekfac": "2.9 / 100",
        "delta_influence": "13.3 / 100",
    },
    ("cifar10", "witches_brew"): {
        "spectral_paper": "1.4 / 96.8",
        "activation_clustering": "2.1 / 93.4",
        "frequency": "10.2 / 93.6",
        "ekfac": "0.8 / 17.4",
        "delta_influence": "3.3 / 19.4",
    },
    ("imagenette", "badnets"): {
        "ekfac": "10.5 / 99.3; 0 / 72.4",
        "delta_influence": "25.8 / 99.3; 0 / 75.4",
        "ekfac_5": "12.8 / 99.0; 0 / 74.4",
        "ekfac_boosted_5": "21.8 / 99.0; 0.3 / 74.0",
        "delta_5": "27.5 / 99.3; 0.3 / 76.6",
        "ekfac_10": "12.9 / 99.3; 0 / 74.1",
        "ekfac_boosted_10": "24.2 / 99.3; 0.3 / 73.6",
        "delta_10": "28.7 / 99.3; 0.3 / 75.0",
    },
}
RESTRICTED = {"delta_restricted", "normalised"}  # detectors whose own rule is the restricted one
NEEDS = dict.fromkeys(DETECTORS | ABLATIONS | SEVERAL, ("factors", "influence")) | {
    "normalised": ("factors", "directions"), "spectral_paper": (), "spectral_tran": (),
    "activation_clustering": (), "frequency": (), "poison_forensics": (),
}  # stages that work for a detector alone  # fmt: skip
PSR_BOUND = 0.05
PAPER = "paper: precision / TPR; PSR / accuracy after EU"
BOTH = "PSR < 5 %, 90 % of EU's accuracy"
COLLAPSE = 0.9  # share of EU's accuracy on the true poison that a repair must keep
NONE = "–"

Row = Sequence[str]
Seeds = Iterable[tuple[str, float]]


def spread(found: Seeds, scale: float = 100.0) -> str:
    """Write mean, standard deviation and number of seeds."""
    numbers = [scale * value for _, value in found]
    if not numbers:
        return NONE
    deviation = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.1f}{deviation} ({len(numbers)})"


def table(title: str, head: Row, rows: Iterable[Row]) -> str:
    """Write a table in Markdown; rows of which nothing has run are left out."""
    full = [row for row in rows if any(cell != NONE for cell in row[2:])]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *full)]
    return f"### {title}\n\n" + "\n".join(lines) + "\n" if full else ""


def attacks(cells: Cells, world: str) -> str:
    """Show that the attacks work: over all seeds, also those on which they fail."""
    rows = []
    for attack, name in ATTACKS.items():
        seeds = of_attack(cells, world, attack)
        success = [(seed, cell["success"]) for seed, cell in seeds.items()]
        before = [
            spread(values(cells, world, attack, "before", key)) for key in ("psr", "accuracy")
        ]
        single = attack == "witches_brew"  # one image, which succeeds or does not
        wins = f"{sum(value > 0 for _, value in success)} of {len(success)} draws"
        reached = wins if single else spread(success)
        psr = NONE if single else before[0]
        rows.append([name, str(len(seeds) or NONE), reached, psr, before[1]])
    head = ["attack", "seeds", "attacked images that succeed", "PSR before", "accuracy before"]
    return table(f"Attacks, {world}", head, rows)


def _quality(cells: Cells, world: str, attack: str, detector: str) -> list[str]:
    """Figures of a detector on all rows, and restricted to the predicted label."""
    figures = [
        spread(values(cells, world, attack, "detectors", detector, rows, key))
        for rows in ("all", "predicted_label")
        for key in ("tpr", "precision", "average_precision")
    ]
    return [NONE] * 3 + figures[3:] if detector in RESTRICTED else figures


def _after(cells: Cells, world: str, attack: str, detector: str, unlearner: str) -> list[str]:
    """PSR and accuracy after a repair; if every row was flagged, nothing is left to repair."""
    flagged = values(cells, world, attack, "detectors", detector, "all_flagged")
    emptied = sum(value for _, value in flagged)
    lost = f"; nothing left on {emptied:.0f}" if emptied else ""
    return [
        spread(values(cells, world, attack, "repairs", f"{detector}/{unlearner}", key)) + lost
        for key in ("psr", "accuracy")
    ]


def _cost(cells: Cells, world: str, attack: str, detector: str) -> str:
    """CPU seconds of a detector, with the stages that work for it."""
    shared = [dict(values(cells, world, attack, "cpu_seconds", stage)) for stage in NEEDS[detector]]
    own = values(cells, world, attack, "detectors", detector, "cpu_seconds")
    return spread(
        ((seed, value + sum(part[seed] for part in shared)) for seed, value in own
         if all(seed in part for part in shared)), 1.0
    )  # fmt: skip


def _base(cells: Cells, world: str, attack: str) -> list[str]:
    """The row of a detector that flags every row it looks at."""
    row = [ATTACKS[attack], "every row"]
    for rows in ("all", "predicted_label"):
        share = spread(values(cells, world, attack, "share", rows))
        row += [NONE if share == NONE else "100", share, NONE]
    return row + [NONE] * 4


def detection(cells: Cells, world: str, title: str, names: dict[str, str]) -> str:
    """Tables 1, 2, 4 and 5: detectors or variants of one, and EU on their own flags."""
    head = ["attack", "detector", "TPR", "precision", "AP", "restricted: TPR", "precision", "AP",
            "PSR after EU", "accuracy after EU", "CPU seconds", PAPER]  # fmt: skip
    rows = []
    for attack, attack_name in ATTACKS.items():
        published = PUBLISHED.get((world, attack), {})
        rows.append(_base(cells, world, attack))
        for detector, name in names.items():
            rows.append(
                [
                    attack_name,
                    name,
                    *_quality(cells, world, attack, detector),
                    *_after(cells, world, attack, detector, "eu"),
                    _cost(cells, world, attack, detector),
                    published.get(detector, NONE),
                ]
            )
    ran = [row for row in rows if any(cell != NONE for cell in row[2:-1])]
    return table(f"{title}, {world}", head, ran)


def unlearning(cells: Cells, world: str, detector: str, title: str) -> str:
    """Figure 4: every unlearner on the flags of one detector, or on reference flags."""
    head = ["attack", "unlearner", "PSR", "accuracy", "robust accuracy", BOTH,
            "gradient samples / 1,000", "CPU seconds"]  # fmt: skip
    rows = []
    for attack, attack_name in ATTACKS.items():
        ran = [
            [
                attack_name,
                name,
                *_after(cells, world, attack, detector, unlearner),
                spread(values(cells, world, attack, "repairs", key, "robust_accuracy")),
                _successes(cells, world, attack, key),
                spread(values(cells, world, attack, "repairs", key, "gradient_samples"), 1e-3),
                spread(values(cells, world, attack, "repairs", key, "cpu_seconds"), 1.0),
            ]
            for unlearner, name in UNLEARNERS.items()
            for key in [f"{detector}/{unlearner}"]
        ]
        before = [
            spread(values(cells, world, attack, "before", key))
            for key in ("psr", "accuracy", "robust_accuracy")
        ]
        if any(cell != NONE for row in ran for cell in row[2:]):
            rows += [[attack_name, "before", *before, NONE, NONE, NONE], *ran]
    return table(f"{title}, {world}", head, rows)


def _successes(cells: Cells, world: str, attack: str, key: str) -> str:
    """Count the seeds on which the poison is gone and the model has not collapsed."""
    best = dict(values(cells, world, attack, "repairs", "truth/eu", "accuracy"))
    accuracy, psr = (
        dict(values(cells, world, attack, "repairs", key, part)) for part in ("accuracy", "psr")
    )
    good = [
        psr[seed] < PSR_BOUND and accuracy[seed] >= COLLAPSE * best[seed]
        for seed in accuracy.keys() & best
    ]
    return f"{sum(good)} of {len(good)}" if good else NONE


def scrub(cells: Cells, world: str) -> str:
    """Figure 5: SCRUB as in the paper's run on the flags of every detector."""
    head = ["attack", "detector", "PSR after SCRUB", "accuracy after SCRUB"]
    rows = [
        [attack_name, name, *_after(cells, world, attack, detector, "scrub_paper")]
        for attack, attack_name in ATTACKS.items()
        for detector, name in DETECTORS.items()
    ]
    return table(f"Figure 5: SCRUB on every detector's flags, {world}", head, rows)


def counterfactual(cells: Cells, world: str, detector: str) -> str:
    """Table 3: what becomes of Witches' Brew without parts of its poison."""
    published = {"found": "0", "missed": "100"}
    seeds = [
        (seed, cell["detectors"][detector]["counterfactual"])
        for seed, cell in of_attack(cells, world, "witches_brew").items()
        if "counterfactual" in cell["detectors"].get(detector, {}) and cell["success"] > 0
    ]
    rows = []
    for name, title in COUNTERFACTUALS.items():
        psr, accuracy = (
            [(seed, value) for seed, found in seeds for value in found[name][key]]
            for key in ("psr", "accuracy")
        )
        wins = f"{sum(value for _, value in psr):.0f} of {len(psr)}" if psr else NONE
        removed = spread(((seed, found[name]["removed"]) for seed, found in seeds), 1.0)
        rows.append([title, published.get(name, NONE), removed, wins, spread(accuracy)])
    head = ["retrained without", "paper: PSR", "rows", "trainings that are fooled", "accuracy"]
    title = f"Table 3: counterfactuals of Witches' Brew, {DETECTORS[detector]}, {world}"
    return table(title, head, rows)


def page(cells: Cells) -> str:
    """Write all tables of all worlds that have cells."""
    parts = []
    for world in sorted({name.split("/")[0] for name in cells}):
        parts += [
            attacks(cells, world),
            detection(cells, world, "Table 1, Figure 3: detectors", DETECTORS),
            detection(cells, world, "Table 2, Figure 7: what a transform changes", ABLATIONS),
            counterfactual(cells, world, "normalised"),
            counterfactual(cells, world, "delta_restricted"),
            unlearning(cells, world, "normalised", "Figure 4: unlearners on the default's flags"),
            scrub(cells, world),
            detection(cells, world, "Tables 4 and 5: several affected inputs", SEVERAL),
            unlearning(cells, world, "truth", "Unlearners on the true poison"),
            unlearning(cells, world, "chance", "Unlearners on clean rows at random"),
            unlearning(cells, world, "nothing", "No row flagged"),
        ]
    return "\n".join(part for part in parts if part)


def fill(path: Path, text: str) -> None:
    """Replace what lies between the two markers of a page."""
    old = path.read_text(encoding="utf-8")
    new = re.sub(
        r"(<!-- tables -->\n).*(<!-- end of tables -->)",
        lambda found: f"{found[1]}\n{text}\n{found[2]}",
        old,
        flags=re.DOTALL,
    )
    write_text(path, new)


def main() -> None:
    """Gather, keep, print and draw."""
    cells = gather()
    write_json(STORE, {"command": COMMAND, "cells": cells})
    text = page(cells)
    print(text)
    fill(PAGE, text)
    draw(cells, ROOT / "docs" / "paper")


if __name__ == "__main__":
    main()
