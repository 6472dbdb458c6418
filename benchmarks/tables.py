"""The tables of the Delta-Influence paper from what ``pipelines/paper`` has run.

Run ``python -m benchmarks.tables`` after any part of
``dvc repro`` in pipelines/paper. It updates benchmarks/results/paper.json, the
pictures in docs/paper and the tables in docs/paper.md; what has not run is a dash.
"""

import re
import statistics
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.paper_cells import (
    STORE,
    Cells,
    Record,
    chosen,
    gather,
    of_attack,
    of_others,
    values,
)
from benchmarks.paper_drawings import draw
from benchmarks.paper_names import (
    ABLATIONS,
    ATTACKS,
    COUNTERFACTUALS,
    DETECTORS,
    FIRST_TABLE,
    NONE,
    PUBLISHED,
    REPAIRED,
    SEVERAL,
    SINGLE,
    UNLEARNERS,
)
from defense.artifacts import write_json, write_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "paper.md"
COMMAND = (
    "in pipelines/paper: python -m pipelines <stage> --cell <cell>; python -m benchmarks.tables"
)
PSR_BOUND = 0.05
PAPER = "paper: precision / TPR; PSR / accuracy after EU"
BOTH = "PSR < 5 %, 90 % of EU's accuracy"
COLLAPSE = 0.9  # share of EU's accuracy on the true poison that a repair must keep
OTHER = " †"
NOTE = (
    "† of other models of these seeds than the figures without it (see above); beside an "
    "unlearner: than those of the row `before`"
)

Row = Sequence[str]
Seeds = Iterable[tuple[str, float]]


def spread(found: Seeds, scale: float = 100.0) -> str:
    """Write mean, standard deviation and number of seeds."""
    numbers = [scale * value for _, value in found]
    if not numbers:
        return NONE
    deviation = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.1f}{deviation} ({len(numbers)})"


def rate(attack: str, found: Seeds) -> str:
    """Write the rate of something; of an attack on one image, on how many models it happened."""
    numbers = [value for _, value in found]
    if attack == SINGLE and numbers:
        return f"{sum(numbers):.0f} of {len(numbers)}"
    return spread(("", value) for value in numbers)


def table(title: str, head: Row, rows: Iterable[Row]) -> str:
    """Write a table in Markdown; rows of which nothing has run are left out."""
    full = [row for row in rows if any(cell != NONE for cell in row[2:])]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *full)]
    note = ["", NOTE] if any(OTHER in cell for row in full for cell in row) else []
    return f"### {title}\n\n" + "\n".join(lines + note) + "\n" if full else ""


def attacks(cells: Cells, world: str) -> str:
    """Show that the attacks work: on all models, also those on which they fail."""
    rows = []
    for attack, name in ATTACKS.items():
        seeds = of_attack(cells, world, attack).items()
        first = [(seed, suspects[0]) for seed, suspects in seeds]
        others = [(seed, suspect) for seed, suspects in seeds for suspect in suspects[1:]]
        rows += [_attack(name, attack, first), _attack(name + OTHER, attack, others)]
    head = ["attack", "models", "attacked images that succeed", "PSR before", "accuracy before"]
    return table(f"Attacks, {world}", head, rows)


def _attack(title: str, attack: str, models: list[tuple[str, Record]]) -> Row:
    """Show the success of an attack on some models, each with its seed."""
    success = [(seed, model["success"]) for seed, model in models]
    psr, accuracy = (
        spread((seed, model["before"][key]) for seed, model in models if "before" in model)
        for key in ("psr", "accuracy")
    )
    psr = NONE if attack == SINGLE else psr
    return [title, str(len(models)), rate(attack, success), psr, accuracy]


def _quality(cells: Cells, world: str, attack: str, detector: str) -> list[str]:
    """Figures of a detector on all rows, and restricted to the predicted label."""
    figures = [
        spread(values(cells, world, attack, "detectors", detector, rows, key))
        for rows in ("all", "predicted_label")
        for key in ("tpr", "precision", "average_precision")
    ]
    own = detector == "normalised" or detector.endswith("_restricted")  # its rule is that one
    return [NONE] * 3 + figures[3:] if own else figures


def _after(
    cells: Cells, world: str, attack: str, detector: str, unlearner: str, of: tuple[str, str]
) -> list[str]:
    """PSR and accuracy after a repair, of the models that another figure is of.

    If every row was flagged, nothing is left to repair.
    """
    own = ("detectors", detector)
    flagged = values(cells, world, attack, *own, "all_flagged", of=own)
    emptied = sum(value for _, value in flagged)
    lost = f"; nothing left on {emptied:.0f}" if emptied else ""
    repair = ("repairs", f"{detector}/{unlearner}")
    psr, accuracy = (
        values(cells, world, attack, *repair, key, of=of) for key in ("psr", "accuracy")
    )
    return [rate(attack, psr) + lost, spread(accuracy) + lost]


def _needs(detector: str) -> tuple[str, ...]:
    """Name the stages that work for a detector alone."""
    if detector == "normalised":
        return "factors", "directions"
    return ("factors", "influence") if detector.startswith(("ekfac", "delta")) else ()


def _cost(cells: Cells, world: str, attack: str, detector: str) -> str:
    """CPU seconds of a detector, with the stages that work for it."""
    timed = ("detectors", detector, "cpu_seconds")
    own = values(cells, world, attack, *timed)
    shared = [
        dict(values(cells, world, attack, "cpu_seconds", stage, of=timed))
        for stage in _needs(detector)
    ]
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


def _mark(cells: Cells, world: str, attack: str, *keys: str, than: tuple[str, ...] = ()) -> str:
    """Mark figures of other models than another one, or than most figures are of."""
    return OTHER if of_others(cells, world, attack, *keys, than=than) else ""


def detection(cells: Cells, world: str, title: str, names: dict[str, str]) -> str:
    """Tables 1, 2, 4 and 5: detectors or variants of one, and EU on their own flags."""
    head = ["attack", "detector", "TPR", "precision", "AP", "restricted: TPR",
            "restricted: precision", "restricted: AP", "PSR after EU", "accuracy after EU",
            "CPU seconds", PAPER]  # fmt: skip
    rows = []
    for attack, attack_name in ATTACKS.items():
        published = PUBLISHED.get((world, attack), {})
        rows.append(_base(cells, world, attack))
        for detector, name in names.items():
            rows.append(
                [
                    attack_name,
                    name + _mark(cells, world, attack, "detectors", detector),
                    *_quality(cells, world, attack, detector),
                    *_after(cells, world, attack, detector, "eu", ("detectors", detector)),
                    _cost(cells, world, attack, detector),
                    published.get(detector, NONE),
                ]
            )
    ran = [row for row in rows if any(cell != NONE for cell in row[2:-1])]
    return table(f"{title}, {world}", head, ran)


def unlearning(cells: Cells, world: str, detector: str, title: str) -> str:
    """Figure 4: every unlearner on the flags of one detector, or on reference flags."""
    head = ["attack", "unlearner", "PSR", "accuracy", "robust accuracy", BOTH,
            "gradient samples / 1,000", "seconds", "paper: PSR / accuracy"]  # fmt: skip
    rows = []
    for attack, attack_name in ATTACKS.items():
        own = ("repairs", f"{detector}/eu")
        there = (world, attack, detector) == ("cifar10", "badnets", "normalised")
        ran = [
            [
                attack_name,
                name + _mark(cells, world, attack, *key, than=own),
                *_after(cells, world, attack, detector, unlearner, key),
                rate(attack, values(cells, world, attack, *key, "robust_accuracy")),
                _successes(cells, world, attack, *key),
                spread(values(cells, world, attack, *key, "gradient_samples"), 1e-3),
                spread(values(cells, world, attack, *key, "seconds"), 1.0),
                REPAIRED.get(unlearner, NONE) if there else NONE,
            ]
            for unlearner, name in UNLEARNERS.items()
            for key in [("repairs", f"{detector}/{unlearner}")]
        ]
        before = [
            write(values(cells, world, attack, "before", key, of=own))
            for key, write in (
                ("psr", partial(rate, attack)),
                ("accuracy", spread),
                ("robust_accuracy", partial(rate, attack)),
            )
        ]
        ran = [row for row in ran if any(cell != NONE for cell in row[2:-1])]
        if ran:
            mark = _mark(cells, world, attack, *own)
            rows += [[attack_name, "before" + mark, *before, *[NONE] * 4], *ran]
    return table(f"{title}, {world}", head, rows)


def _successes(cells: Cells, world: str, attack: str, *key: str) -> str:
    """Count the seeds on which the poison is gone and the model has not collapsed."""
    best = dict(values(cells, world, attack, "repairs", "truth/eu", "accuracy"))
    accuracy, psr = (dict(values(cells, world, attack, *key, part)) for part in ("accuracy", "psr"))
    good = [
        psr[seed] < PSR_BOUND and accuracy[seed] >= COLLAPSE * best[seed]
        for seed in accuracy.keys() & best
    ]
    return f"{sum(good)} of {len(good)}" if good else NONE


def scrub(cells: Cells, world: str) -> str:
    """Figure 5: SCRUB as in the paper's run on the flags of every detector."""
    head = ["attack", "detector", "PSR after SCRUB", "accuracy after SCRUB"]
    rows = [
        [
            attack_name,
            name + _mark(cells, world, attack, *key),
            *_after(cells, world, attack, detector, "scrub_paper", key),
        ]
        for attack, attack_name in ATTACKS.items()
        for detector, name in DETECTORS.items()
        for key in [("repairs", f"{detector}/scrub_paper")]
    ]
    return table(f"Figure 5: SCRUB on every detector's flags, {world}", head, rows)


def counterfactual(cells: Cells, world: str, detector: str) -> str:
    """Table 3: what becomes of Witches' Brew without parts of its poison."""
    published = {"found": "0", "missed": "100"}
    own = ("detectors", detector, "counterfactual")
    seeds = [
        (seed, cell["detectors"][detector]["counterfactual"])
        for seed, cell in chosen(cells, world, SINGLE, *own).items()
    ]
    rows = []
    for name, title in COUNTERFACTUALS.items():
        psr, accuracy = (
            [(seed, value) for seed, found in seeds if name in found for value in found[name][key]]
            for key in ("psr", "accuracy")
        )
        wins = f"{sum(value for _, value in psr):.0f} of {len(psr)}" if psr else NONE
        removed = spread(
            ((seed, found[name]["removed"]) for seed, found in seeds if name in found), 1.0
        )
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
            detection(cells, world, f"{FIRST_TABLE.get(world, 'Table 1')}: detectors", DETECTORS),
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
