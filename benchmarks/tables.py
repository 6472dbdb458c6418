"""The tables of the Delta-Influence paper from what ``pipelines/paper`` has run.

Run ``python -m benchmarks.tables`` after any part of
``python -m dvc repro pipelines/paper/dvc.yaml``. It updates benchmarks/results/paper.json, the
pictures in docs/paper and the tables in docs/paper.md; what has not run is a dash.
"""

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper_cells import ROOT, Cell, Cells, gather, repair, values
from benchmarks.paper_drawings import draw
from benchmarks.record import hardware, versions
from defense.artifacts import write_json, write_text

STORE = ROOT / "benchmarks" / "results" / "paper.json"
PAGE = ROOT / "docs" / "paper.md"
COMMAND = "python -m dvc repro pipelines/paper/dvc.yaml && python -m benchmarks.tables"
ATTACKS = {"badnets": "BadNet", "smooth": "smooth trigger", "witches_brew": "Witches' Brew"}
DETECTORS = {
    "spectral_paper": "Spectral Signatures (`paper`)",
    "spectral_tran": "Spectral Signatures (`tran`)",
    "activation_clustering": "Activation Clustering",
    "frequency": "frequency detector",
    "poison_forensics": "Poison Forensics",
    "ekfac": "EK-FAC > 10",
    "delta_influence": "Delta-Influence, all rows",
    "default": "Delta-Influence, rows labelled as predicted",
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
    "badt": "BadT",
    "potion": "Potion",
}
COUNTERFACTUALS = {
    "found": "flagged poison",
    "missed": "poison that is not flagged",
    "any_poison": "as much poison, at random",
    "clean": "as many clean rows of the target class",
}
# Precision and TPR in per cent, CIFAR-10 columns of the paper's Table 1.
PUBLISHED = {
    "spectral_paper": {
        "badnets": "3.6 / 88.3",
        "smooth": "1.3 / 88.3",
        "witches_brew": "1.4 / 96.8",
    },
    "activation_clustering": {
        "badnets": "2.2 / 94.9",
        "smooth": "2.2 / 99.1",
        "witches_brew": "2.1 / 93.4",
    },
    "frequency": {"badnets": "8.0 / 72.3", "smooth": "0.4 / 3.2", "witches_brew": "10.2 / 93.6"},
    "ekfac": {"badnets": "2.8 / 67.1", "smooth": "2.9 / 100", "witches_brew": "0.8 / 17.4"},
    "delta_influence": {
        "badnets": "17.6 / 99.1",
        "smooth": "13.3 / 100",
        "witches_brew": "3.3 / 19.4",
    },
}
# Table 4 (Imagenette, BadNet); the body of Table 5 is not in the text at hand.
PUBLISHED_SEVERAL = {
    "ekfac": "10.5 / 99.3",
    "delta_influence": "25.8 / 99.3",
    "ekfac_5": "12.8 / 99.0",
    "ekfac_boosted_5": "21.8 / 99.0",
    "delta_5": "27.5 / 99.3",
    "ekfac_10": "12.9 / 99.3",
    "ekfac_boosted_10": "24.2 / 99.3",
    "delta_10": "28.7 / 99.3",
}
COLLAPSE = 0.9  # share of EU's accuracy on the true poison that a repair must keep

Row = Sequence[str]


def spread(found: Iterable[float], scale: float = 100.0) -> str:
    """Write mean, standard deviation and number of seeds."""
    numbers = [scale * value for value in found]
    if not numbers:
        return "–"
    mean = f"{statistics.fmean(numbers):.1f}"
    deviation = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{mean}{deviation} ({len(numbers)})"


def table(title: str, head: Row, rows: Iterable[Row]) -> str:
    """Write a table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return f"### {title}\n\n" + "\n".join(lines) + "\n"


def detection(cells: Cells, world: str) -> str:
    """Table 1: every detector, unrestricted and restricted, and EU on its flags."""
    head = ["attack", "detector", "TPR", "precision", "AP", "restricted: TPR", "precision", "AP",
            "PSR after EU", "accuracy after EU", "paper: precision / TPR"]  # fmt: skip
    rows = []
    for attack, attack_name in ATTACKS.items():
        for detector, name in DETECTORS.items():
            figures = [
                spread(
                    values(cells, world, attack, repair(detector, "eu", "detection", rows_, key))
                )
                for rows_ in ("all", "predicted_label")
                for key in ("tpr", "precision", "average_precision")
            ]
            after = _after(cells, world, attack, detector, "eu")
            published = PUBLISHED.get(detector, {}).get(attack, "–")
            rows.append([attack_name, name, *figures, *after, published])
    return table(f"Table 1, Figure 3: detectors, {world}", head, rows)


def _quality(cells: Cells, world: str, attack: str, detector: str, keys: Row) -> list[str]:
    """Figures of a detector, unrestricted and restricted to the predicted label."""
    return [
        spread(values(cells, world, attack, repair(detector, "eu", "detection", rows, key)))
        for rows in ("all", "predicted_label")
        for key in keys
    ]


def _after(cells: Cells, world: str, attack: str, detector: str, unlearner: str) -> list[str]:
    return [
        spread(values(cells, world, attack, repair(detector, unlearner, key)))
        for key in ("psr", "accuracy")
    ]


def attacks(cells: Cells, world: str) -> str:
    """Show that the attacks work."""
    before: dict[str, Callable[[Cell], Any]] = {
        "psr": lambda cell: cell["before"]["psr"],
        "accuracy": lambda cell: cell["before"]["accuracy"],
    }
    rows = [
        [
            name,
            spread(values(cells, world, attack, lambda cell: cell["success"])),
            *(spread(values(cells, world, attack, pick)) for pick in before.values()),
        ]
        for attack, name in ATTACKS.items()
    ]
    head = ["attack", "probe images that succeed", "PSR before", "accuracy before"]
    return table(f"Attacks, {world}", head, rows)


def variants(cells: Cells, world: str, title: str, names: dict[str, str], published: Any) -> str:
    """Tables 2, 4 and 5: variants of the influence rules."""
    head = ["attack", "variant", "TPR", "precision", "restricted: TPR", "precision",
            "PSR after EU", "accuracy after EU", "paper: precision / TPR"]  # fmt: skip
    rows = []
    for attack, attack_name in ATTACKS.items():
        for detector, name in names.items():
            figures = [
                spread(
                    values(cells, world, attack, repair(detector, "eu", "detection", rows_, key))
                )
                for rows_ in ("all", "predicted_label")
                for key in ("tpr", "precision")
            ]
            after = _after(cells, world, attack, detector, "eu")
            rows.append([attack_name, name, *figures, *after, published.get(detector, "–")])
    return table(f"{title}, {world}", head, rows)


def unlearning(cells: Cells, world: str, detector: str, title: str) -> str:
    """Figure 4: every unlearner on the flags of one detector, or on reference flags."""
    head = ["attack", "unlearner", "PSR", "accuracy", "keeps 90 % of EU's accuracy",
            "gradient samples / 1,000", "seconds"]  # fmt: skip
    rows = []
    for attack, attack_name in ATTACKS.items():
        best = list(values(cells, world, attack, repair("truth", "eu", "accuracy")))
        for unlearner, name in UNLEARNERS.items():
            picks = {key: repair(detector, unlearner, key) for key in
                     ("psr", "accuracy", "gradient_samples", "seconds")}  # fmt: skip
            found = {key: list(values(cells, world, attack, pick)) for key, pick in picks.items()}
            keeps = [a >= COLLAPSE * statistics.fmean(best) for a in found["accuracy"] if best]
            rows.append(
                [
                    attack_name,
                    name,
                    spread(found["psr"]),
                    spread(found["accuracy"]),
                    f"{sum(keeps)} of {len(keeps)}",
                    spread(found["gradient_samples"], 1e-3),
                    spread(found["seconds"], 1.0),
                ]
            )
    return table(f"{title}, {world}", head, rows)


def scrub(cells: Cells, world: str) -> str:
    """Figure 5: SCRUB on the flags of every detector."""
    head = ["attack", "detector", "PSR after SCRUB", "accuracy after SCRUB"]
    rows = [
        [attack_name, name, *_after(cells, world, attack, detector, "scrub")]
        for attack, attack_name in ATTACKS.items()
        for detector, name in DETECTORS.items()
    ]
    return table(f"Figure 5: SCRUB on every detector's flags, {world}", head, rows)


def counterfactual(cells: Cells, world: str) -> str:
    """Table 3: what becomes of Witches' Brew without parts of its poison."""
    published = {"found": "0", "missed": "100"}

    def pick(name: str, key: str) -> Callable[[Cell], Any]:
        return lambda cell: cell["counterfactual"][name][key]

    rows = [
        [
            title,
            *(
                spread(values(cells, world, "witches_brew", pick(name, key)), scale)
                for key, scale in (("removed", 1.0), ("psr", 100.0), ("accuracy", 100.0))
            ),
            published.get(name, "–"),
        ]
        for name, title in COUNTERFACTUALS.items()
    ]
    head = ["retrained without", "rows", "PSR", "accuracy", "paper: PSR"]
    return table(f"Table 3: counterfactuals of Witches' Brew, {world}", head, rows)


def page(cells: Cells) -> str:
    """Write all tables of all worlds that have cells."""
    parts = []
    for world in sorted({name.split("/")[0] for name in cells}):
        parts += [
            attacks(cells, world),
            detection(cells, world),
            variants(cells, world, "Table 2, Figure 7: what a transform changes", ABLATIONS, {}),
            counterfactual(cells, world),
            unlearning(cells, world, "default", "Figure 4: unlearners on the default's flags"),
            scrub(cells, world),
            variants(cells, world, "Tables 4 and 5: several inputs", SEVERAL, PUBLISHED_SEVERAL),
            unlearning(cells, world, "truth", "Unlearners on the true poison"),
            unlearning(cells, world, "chance", "Unlearners on clean rows at random"),
        ]
    return "\n".join(parts)


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
    facts = {"command": COMMAND, "hardware": hardware(), "versions": versions()}
    write_json(STORE, facts | {"cells": cells})
    text = page(cells)
    print(text)
    fill(PAGE, text)
    draw(cells, ROOT / "docs" / "paper")


if __name__ == "__main__":
    main()
