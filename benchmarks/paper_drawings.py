"""The figures of the Delta-Influence paper from what ``pipelines/paper`` has run."""

import statistics
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper_cells import HOME, Cells, of_others, values
from benchmarks.paper_names import ABLATIONS, ATTACKS, DETECTORS, NONE, SINGLE, UNLEARNERS
from defense.storage import load_scores, load_truth

Bars = dict[str, tuple[str, str]]  # label to detector and unlearner

POISON, CLEAN = "#b3261e", "#5f6b7a"
BARS: dict[str, Bars] = {
    "figure3": {name: (name, "eu") for name in DETECTORS},
    "figure4": {name: ("normalised", name) for name in UNLEARNERS},
    "figure5": {name: (name, "scrub_paper") for name in DETECTORS},
    "figure7": {name: (name, "eu") for name in ABLATIONS},
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
    """Draw PSR and accuracy of what has run, with deviations over seeds; None if nothing has."""
    found = [(attack, _ways(cells, world, attack, bars)) for attack in ATTACKS]
    drawn = [(attack, ways) for attack, ways in found if ways]
    if not drawn:
        return None
    bars = {name: way for name, way in bars.items() if any(name in ways for _, ways in drawn)}
    figure = Figure(figsize=(4.6 * max(2, len(drawn)), 4.4), layout="constrained")
    for column, (attack, ways) in enumerate(drawn):
        axes = figure.add_subplot(1, len(drawn), column + 1)
        for place, name in enumerate(bars):
            for offset, key, colour in ((-0.2, "psr", POISON), (0.2, "accuracy", CLEAN)):
                seeds = values(cells, world, attack, "repairs", ways.get(name, ""), key)
                spread = (attack, key) != (SINGLE, "psr")  # of one image there are counts alone
                _bar(axes, place + offset, [v for _, v in seeds], colour, spread=spread)
        names = [
            f"{name} †" if of_others(cells, world, attack, "repairs", ways.get(name, "")) else name
            for name in bars
        ]
        axes.axhline(0.05, color="black", lw=0.8, ls=":")
        axes.set_xticks(range(len(bars)), names, rotation=60, ha="right", fontsize=8)
        axes.set(title=f"{world}, {ATTACKS[attack]}", ylim=(0, 1.12))
        axes.set_xlim(-0.6, len(bars) - 0.4)
        axes.set_ylabel("share of images, mean over seeds" if column == 0 else "")
    figure.suptitle(
        "poison success (red) and clean accuracy (grey) afterwards; † of other models", fontsize=10
    )
    return figure


def _ways(cells: Cells, world: str, attack: str, bars: Bars) -> dict[str, str]:
    """Pick the repairs of an attack that have run, by the label of their bar."""
    keys = {name: "/".join(way) for name, way in bars.items()}
    return {
        name: key
        for name, key in keys.items()
        if any([*values(cells, world, attack, "repairs", key, "psr")])
    }


def _bar(axes: Axes, place: float, found: list[float], colour: str, *, spread: bool) -> None:
    """Draw a mean with its value in per cent; a dash where nothing has run."""
    if not found:
        axes.text(place, 0.02, NONE, ha="center", fontsize=7)
        return
    mean, several = statistics.fmean(found), spread and len(found) > 1
    error = statistics.stdev(found) if several else 0.0
    low, high = min(error, mean), min(error, 1 - mean)
    axes.bar(place, mean, 0.38, color=colour)
    if several:
        axes.errorbar(place, mean, yerr=[[low], [high]], capsize=2, color="black", lw=1)
    top, text = mean + (high if several else 0.0) + 0.015, f"{100 * mean:.0f}"
    axes.text(place, top, text, ha="center", fontsize=6, rotation=90)


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
