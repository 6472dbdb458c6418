"""Rows of the tables of docs/detection.md, from what `benchmarks.detection` has measured."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Models = dict[str, dict[str, Any]]

TITLES = {
    "clean": "clean",
    "flips_5": "5 % of the labels wrong, no attack",
    "badnets_1": "BadNet 1 %",
    "badnets_025": "BadNet 0.25 %",
    "badnets_01": "BadNet 0.1 %",
    "badnets_all": "BadNet 1 %, every class to one",
    "smooth_1": "smooth 1 %",
    "smooth_025": "smooth 0.25 %",
    "blended_1": "Blended 1 %",
    "blended_025": "Blended 0.25 %",
    "sig_1": "SIG 1 %",
    "two": "BadNet and Blended, 1 % each",
    "imagenette_clean": "Imagenette, clean",
    "imagenette_badnets_1": "Imagenette, BadNet 1 %",
    "imagenette_blended_1": "Imagenette, Blended 1 %",
}
UNUSUAL = {
    "warp_3": "warped images, 3 %",
    "wandering_2": "a patch that wanders, 2 %",
    "badnets_6": "BadNet 6 % (three eighths of its class)",
    "fashion_clean": "Fashion-MNIST, 20,000 rows, clean",
    "fashion_badnets_1": "Fashion-MNIST, 20,000 rows, BadNet 1 %",
    "turned_clean": "40 classes, 20,000 rows, clean",
    "turned_badnets_05": "40 classes, 20,000 rows, BadNet 0.5 %",
    "noisy_badnets_1": "5 % of the labels wrong, BadNet 1 %",
    "rare_badnets_1": "a class of 250 of 9,250 rows, BadNet 1 %",
    "binary_badnets_2": "two classes, 4,000 rows, BadNet 2 %",
    "cnn_badnets_2": "plain CNN of three convolutions, BadNet 2 %",
    "transformer_badnets_2": "vision transformer, BadNet 2 %",
}
NONE = "–"
FEWEST = 3  # models of a version, to say something
OLDER = " †"
LEGEND = "\n† measured with the version before the last, †† with the one before that.\n"


def spread(values: Iterable[float | None], scale: float = 100.0) -> str:
    """Write mean ± standard deviation (number), of what was measured."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return NONE
    more = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.1f}{more} ({len(known)})"


def version(model: dict[str, Any]) -> int:
    """Tell with which version of the detector a model was measured; the first wrote none down."""
    known: int = model.get("version", 1)
    return known


def mark_of(known: int, models: Models) -> str:
    """Mark a version of the detector by how many there are after it."""
    later = max(map(version, models.values()), default=known) - known
    return OLDER + "†" * (later - 1) if later > 0 else ""


def of(models: Models, attack: str) -> list[list[dict[str, Any]]]:
    """Pick the models of an attack, those of the latest version first, each by seed."""
    found = [model for model in models.values() if model["attack"] == attack]
    ordered = sorted(found, key=lambda model: (-version(model), model["seed"]))
    return [[*own] for _, own in itertools.groupby(ordered, key=version)]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def each(
    models: Models,
    row: Callable[[list[dict[str, Any]]], list[str]],
    titles: Mapping[str, str] = TITLES,
) -> list[list[str]]:
    """Write a row for every attack and version that was measured, unless it has no cells.

    Rows of versions before the latest are marked, and left out once a later one has enough models.
    """
    rows = []
    for attack, title in titles.items():
        for found in of(models, attack):
            asked = [model for model in found if row([model])]
            if asked:
                rows.append([title + mark_of(version(found[0]), models), *row(asked)])
            if len(asked) >= FEWEST:
                break
    return rows


def runs_of(found: list[dict[str, Any]], rate: str) -> list[list[dict[str, Any]]]:
    """List the investigations of every model, because those of one agree with each other."""
    models = [model.get("investigations", {}).get(rate, []) for model in found]
    return [own for own in models if own]


def mean(values: Iterable[float | None]) -> float | None:
    """Average of what was measured."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def investigated(found: list[dict[str, Any]]) -> list[str]:
    """One affected input at a time, at the default false-discovery rate."""
    models = runs_of(found, "0.05")
    runs = list(itertools.chain(*models))
    apart = [model["apart"] for model in found if "apart" in model]
    return [
        spread(rate for model in found for rate in model.get("psr", ())),
        f"{sum(run['found'] for run in runs)} of {len(runs)}" if runs else NONE,
        spread(mean(run["tpr"] for run in own) for own in models),
        spread(mean(run["precision"] for run in own) for own in models),
        f"{sum(not a['mixed'] for a in apart)} of {len(apart)}" if apart else NONE,
        f"{sum(m['innocent']['alarms'] for m in found)} of "
        f"{sum(m['innocent']['inputs'] for m in found)}",
    ]


def runs_with_flags(found: list[dict[str, Any]], rate: str) -> list[list[dict[str, Any]]]:
    """List the investigations of every model that flagged rows."""
    known = [[run for run in own if run["precision"] is not None] for own in runs_of(found, rate)]
    return [own for own in known if own]


def intervals_held(found: list[dict[str, Any]], rate: str) -> tuple[int, int]:
    """Count the models all of whose intervals hold the share of false flags, and all models."""
    known = runs_with_flags(found, rate)
    return sum(all(run["inside"] for run in own) for own in known), len(known)


def runs_held(found: list[dict[str, Any]], rate: str) -> tuple[int, int]:
    """Count the investigations whose interval holds the share of false flags, and all."""
    runs = [run["inside"] for own in runs_with_flags(found, rate) for run in own]
    return sum(runs), len(runs)


def controlled(found: list[dict[str, Any]]) -> list[str]:
    """Share of false flags at three promised rates; models whose intervals all hold it."""
    cells = []
    for rate in ("0.02", "0.05", "0.1"):
        false = (mean(1 - run["precision"] for run in own) for own in runs_with_flags(found, rate))
        held, known = intervals_held(found, rate)
        cells += [spread(false), f"{held} of {known}" if known else NONE]
    return cells


def several(found: list[dict[str, Any]]) -> list[str]:
    """Several affected inputs together: recall, precision, models with an incident per attack."""
    models = [(model["several"], len(model["psr"])) for model in found if "several" in model]
    cells = []
    for place in range(max((len(parts) for parts, _ in models), default=0)):
        parts = [own[place] for own, _ in models]
        right = sum(own[place]["incidents"] == attacks for own, attacks in models)
        cells += [
            spread(part["tpr"] for part in parts),
            spread(part["precision"] for part in parts),
        ]
        cells.append(f"{right} of {len(parts)}")
    return cells


def whole(found: list[dict[str, Any]]) -> list[str]:
    """Every class as a whole, without an input: those with poison, and those without."""
    classes = [entry for model in found for entry in model["classes"]]
    poisoned = [entry for entry in classes if entry["planted"]]
    clean = [entry for entry in classes if not entry["planted"]]
    told = [entry for entry in poisoned if entry["found"]]
    return [
        f"{len(told)} of {len(poisoned)}" if poisoned else NONE,
        spread(entry["hits"] / entry["planted"] for entry in told),
        spread(entry["hits"] / entry["flagged"] for entry in told),
        f"{sum(bool(entry['inside']) for entry in told)} of {len(told)}" if told else NONE,
        f"{sum(entry['found'] for entry in clean)} of {len(clean)}",
    ]


def repairs(found: list[dict[str, Any]]) -> list[str]:
    """Models after removal of what is flagged, beside those that never saw the poison."""
    parts = [model["repair"] for model in found if model.get("repair")]
    if not parts:
        return []
    cells = [spread(rate for part in parts for rate in part["clean"]["psr"])]
    for name in ("eu", "cf"):
        cells.append(spread(rate for part in parts for rate in part[name]["psr"]))
        loss = (part["clean"]["accuracy"] - part[name]["accuracy"] for part in parts)
        cells.append(spread(loss))
    return cells


def labels(found: list[dict[str, Any]]) -> list[str]:
    """Planted wrong labels: how many are fitted, how they rank, and what is suggested instead."""
    parts = [model["labels"] for model in found if "labels" in model]
    names = ("fitted", "doubt", "self_influence", "loss", "suggested")
    return [spread(part[name] for part in parts) for name in names] if parts else []


def scans(kind: str) -> Callable[[list[dict[str, Any]]], list[str]]:
    """Alarms of a scan, and what it finds."""

    def row(found: list[dict[str, Any]]) -> list[str]:
        parts = [model[kind] for model in found]
        cells = [
            f"{sum(part['alarm'] for part in parts)} of {len(parts)}",
            spread(part["tpr"] for part in parts),
            spread(part["precision"] for part in parts),
            spread((sum(not b["suspected"] for b in part["blocks"]) for part in parts), 1.0),
        ]
        pointed = f"{sum(part['pointed'] > 0 for part in parts)} of {len(parts)}"
        return [*cells, pointed] if kind == "scan_inputs" else cells

    return row


def unusual(found: list[dict[str, Any]]) -> list[str]:
    """All that is asked of a suspect, of those that are unlike the others."""
    return [
        spread(model["accuracy"] for model in found),
        *investigated(found)[:4],
        *whole(found)[:3],
        *scans("scan")(found)[:3],
        investigated(found)[5],
    ]


PREPARED = ("factors", "directions")
PARTS = (PREPARED, ("investigation",), (*PREPARED, "scan"), (*PREPARED, "scan_inputs"))


def epochs(found: list[dict[str, Any]]) -> list[list[float | None]]:
    """Epochs of training that `PARTS` take, of each model measured alone on a machine."""
    seconds = [model["seconds"] for model in found if model["alone"]]
    return [[_sum(own, parts) for own in seconds] for parts in PARTS] if seconds else []


def times(found: list[dict[str, Any]]) -> list[str]:
    """Write down what `epochs` gives."""
    return [spread(values, 1.0) for values in epochs(found)]


def _sum(seconds: dict[str, Any], parts: Iterable[str]) -> float | None:
    """Epochs that parts take together; None if one was not run, or the training was resumed."""
    known: list[Any] = [seconds.get(part) for part in (*parts, "epoch")]
    return None if None in known else float(sum(known[:-1]) / known[-1])
