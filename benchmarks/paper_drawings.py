"""The figures of the Delta-Influence paper from what ``pipelines/paper`` has run."""

import statistics
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.paper_cells import HOME, Cells, of_others, values
from defense.storage import load_scores, load_truth

Bars = dict[str, tuple[str, str]]  # label to detector and unlearner

POISON, CLEAN = "#b3261e", "#5f6b7a"
ATTACKS = ("badnets", "smooth", "witches_brew")
DETECTORS = ("spectral_paper", "activation_clustering", "frequency", "poison_forensics", "ekfac",
             "delta_influence", "delta_restricted", "normalised")  # fmt: skip
UNLEARNERS = ("eu", "cf_full", "cf", "ssd", "scrub", "scrub_paper", "badt", "badt_long", "potion")
BARS: dict[str, Bars] = {
    "figure3": {name: (name, "eu") for name in DETECTORS},
    "figure4": {name: ("normalised", name) for name in UNLEARNERS},
    "figure5": {name: (name, "scrub_paper") for name in DETECTORS},
    "figure7": {name: (name, "eu") for name in ("delta_influence", "delta_image", "delta_label")},
}
SHOWN = 6  # transforms of Figure 2


def draw(cells: Cells, folder: Path) -> None:
    """Write a picture for every figure that has something to show.

    One of which nothing is left is deleted; Figure 2 takes scores, which only the machine has
    that they were computed on, and stays.
    """
    folder.mkdir(exist_ok=True)
    for world in sorted({name.split("/")[0] for name in cells}):
        for name, bars in BARS.items():
            picture, path = _bars(cells, world, bars), folder / f"{world}-{name}.png"
            if picture is None:
                path.unlink(missing_ok=True)
            else:
                _write(picture, path)
        collapse = _collapse(world)
        if collapse is not None:
            _write(collapse, folder / f"{world}-figure2.png")


def _write(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _bars(cells: Cells, world: str, bars: Bars) -> Figure | None:
    """Draw PSR and accuracy for every attack, with deviations over seeds, of what has run."""
    bars = {
        name: way
        for name, way in bars.items()
        if any(
            [*values(cells, world, attack, "repairs", "/".join(way), "psr")] for attack in ATTACKS
        )
    }
    figure = Figure(figsize=(3.6 * len(ATTACKS), 4.2), layout="constrained")
    drawn = 0
    for column, attack in enumerate(ATTACKS):
        axes = figure.add_subplot(1, len(ATTACKS), column + 1)
        for offset, key, colour in ((-0.2, "psr", POISON), (0.2, "accuracy", CLEAN)):
            for place, way in enumerate(bars.values()):
                seeds = values(cells, world, attack, "repairs", "/".join(way), key)
                found = [value for _, value in seeds]
                drawn += len(found)
                if found:
                    error = statistics.stdev(found) if len(found) > 1 else 0.0
                    mean = statistics.fmean(found)
                    inside = [[min(error, mean)], [min(error, 1 - mean)]]
                    axes.bar(place + offset, mean, 0.38, yerr=inside, capsize=2, color=colour)
        names = [
            f"{name} †" if of_others(cells, world, attack, "repairs", "/".join(way)) else name
            for name, way in bars.items()
        ]
        axes.axhline(0.05, color="black", lw=0.8, ls=":")
        axes.set_xticks(range(len(bars)), names, rotation=60, ha="right", fontsize=8)
        axes.set(title=f"{world}, {attack}", ylim=(0, 1.05))
    figure.suptitle(
        "poison success (red) and clean accuracy (grey) afterwards; † of other models", fontsize=10
    )
    return figure if drawn else None


def _collapse(world: str) -> Figure | None:
    """Draw Delta of all rows under some transforms, for the smooth trigger's first seed."""
    home = next(iter(sorted((HOME / "cells" / world).glob("*/smooth/artifacts"))), None)
    if home is None or not (home / "scores").is_dir():
        return None
    (queries, scores), _ = load_scores(home / "scores")
    poisoned = load_truth(home / "truth")[0].poisoned
    first = queries.affected.numpy() == 0
    original = scores[first & queries.changed("none")][0]
    delta = scores[first & queries.changed("both")][:SHOWN] - original
    figure = Figure(figsize=(11, 5), layout="constrained")
    limit = float(np.abs(delta).max())
    for place, row in enumerate(delta):
        axes = figure.add_subplot(2, -(-len(delta) // 2), place + 1)
        for mask, colour, size in ((~poisoned, CLEAN, 2), (poisoned, POISON, 6)):
            axes.scatter(np.flatnonzero(mask), row[mask], s=size, color=colour, linewidths=0)
        axes.set_yscale("symlog", linthresh=1.0)
        axes.set(ylim=(-limit, limit), title=f"transform {place + 1}")
        axes.tick_params(labelsize=7)
    figure.suptitle(
        f"{world}, smooth trigger: change of influence by training row (red: planted)", fontsize=10
    )
    return figure
