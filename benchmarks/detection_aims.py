"""What the detector is meant to reach, and whether the models measured last reach it."""

from collections.abc import Iterable
from typing import Any

from benchmarks.detection_rows import (
    TITLES,
    Models,
    epochs,
    intervals_held,
    mean,
    of,
    runs_of,
    spread,
    version,
)

Found = list[dict[str, Any]]

FEWEST = 3  # models, for an aim to count as reached
FROM_ONE = {  # recall and precision from one affected input
    "badnets_1": (0.98, 0.97),
    "smooth_1": (0.98, 0.97),
    "blended_1": (0.98, 0.97),
    "badnets_025": (0.93, 0.95),
    "badnets_all": (0.95, 0.9),
    "two": (0.95, 0.9),
}
SCANNED = ("badnets_1", "smooth_1", "blended_1", "badnets_025")
REPAIRED = (*FROM_ONE, "sig_1")
COSTS = (  # which of `PARTS`, and how many epochs at most
    ("an investigation beyond the factors: a quarter of an epoch", 1, 0.25),
    ("a scan of all classes, with factors and directions: 3 epochs", 2, 3.0),
)
KINDS = {"scan": "scan of the training set alone", "scan_inputs": "scan from untriggered inputs"}
HEAD = ["aim", "measured (models)", "reached"]


def answer(reached: bool, models: int) -> str:
    """Say whether an aim is reached, or that the models are too few to say so."""
    if not reached:
        return "**no**"
    return "yes" if models >= FEWEST else f"yes, on fewer than {FEWEST} models"


def aims(models: Models) -> list[list[str]]:
    """Compare what was measured last with every aim: a row for each that was measured."""
    newest = max(map(version, models.values()), default=1)
    latest = {
        attack: [model for model in (of(models, attack) or [[]])[0] if version(model) == newest]
        for attack in TITLES
    }
    rows = [
        *(_from_one(attack, latest[attack], *least) for attack, least in FROM_ONE.items()),
        _apart(latest["two"]),
        _alarms(latest["clean"]),
        _intervals([model for found in latest.values() for model in found]),
        *(_repaired(attack, latest[attack], name) for attack in REPAIRED for name in ("eu", "cf")),
        *(_scanned(attack, latest[attack], kind) for kind in KINDS for attack in SCANNED),
        *(_silent(latest["clean"], kind) for kind in KINDS),
        *_costs([model for found in latest.values() for model in found]),
    ]
    return [row for row in rows if row]


def _from_one(attack: str, found: Found, recall: float, precision: float) -> list[str]:
    runs = runs_of(found, "0.05")
    if not runs:
        return []
    reached = [[mean(run[key] for run in own) for own in runs] for key in ("tpr", "precision")]
    means = [mean(values) or 0.0 for values in reached]
    least = f"recall {100 * recall:.0f}, precision {100 * precision:.0f} %"
    return [
        f"{TITLES[attack]}, one affected input: {least}",
        f"{spread(reached[0])}, {spread(reached[1])}",
        answer(means[0] >= recall and means[1] >= precision, len(runs)),
    ]


def _apart(found: Found) -> list[str]:
    told = [model["apart"] for model in found if "apart" in model]
    right = sum(one["incidents"] == 2 and not one["mixed"] for one in told)
    if not told:
        return []
    return [
        "two attacks: their inputs make two incidents",
        f"{right} of {len(told)}",
        answer(right == len(told), len(told)),
    ]


def _alarms(found: Found) -> list[str]:
    asked = sum(model["innocent"]["inputs"] for model in found)
    alarms = sum(model["innocent"]["alarms"] for model in found)
    if not asked:
        return []
    return [
        "clean models: alarms on at most 2 % of inputs",
        f"{alarms} of {asked} ({len(found)})",
        answer(alarms <= 0.02 * asked, len(found)),
    ]


def _intervals(found: Found) -> list[str]:
    held = [intervals_held(found, rate) for rate in ("0.05", "0.1")]
    if not held[0][1]:
        return []
    return [
        "false flags within their interval on 90 % of models, at 5 and 10 %",
        ", ".join(f"{inside} of {known}" for inside, known in held),
        answer(all(inside >= 0.9 * known for inside, known in held), held[0][1]),
    ]


def _repaired(attack: str, found: Found, name: str) -> list[str]:
    parts = [model["repair"] for model in found if model.get("repair")]
    if not parts:
        return []
    success = [rate for part in parts for rate in part[name]["psr"]]
    without = [rate for part in parts for rate in part["clean"]["psr"]]
    lost = [part["clean"]["accuracy"] - part[name]["accuracy"] for part in parts]
    reached = max(success) < 0.05 and (mean(lost) or 0.0) <= 0.005
    return [
        f"{TITLES[attack]}, after {name.upper()}: every PSR below 5 %, accuracy within 0.5 points "
        "of a model without the poison",
        f"PSR {spread(success)}, without poison {spread(without)}; lost {spread(lost)}",
        answer(reached, len(parts)),
    ]


def _scanned(attack: str, found: Found, kind: str) -> list[str]:
    parts = [model[kind] for model in found]
    if not parts:
        return []
    alarms, share = sum(part["alarm"] for part in parts), 0.9 if kind == "scan" else 0.8
    reached, shown = alarms >= share * len(parts), f"{alarms} of {len(parts)}"
    aim = f"{TITLES[attack]}, {KINDS[kind]}: found on {100 * share:.0f} % of models"
    if kind == "scan" and attack != "badnets_025":
        rates = [[part[key] or 0.0 for part in parts] for key in ("tpr", "precision")]
        aim += ", recall and precision 95 %"
        shown += f"; {spread(rates[0])}, {spread(rates[1])}"
        reached = reached and all((mean(values) or 0.0) >= 0.95 for values in rates)
    return [aim, shown, answer(reached, len(parts))]


def _silent(found: Found, kind: str) -> list[str]:
    alarms = sum(model[kind]["alarm"] for model in found)
    if not found:
        return []
    return [
        f"clean models, {KINDS[kind]}: at most 1 alarm of 10",
        f"{alarms} of {len(found)}",
        answer(alarms <= 0.1 * len(found), len(found)),
    ]


def _costs(found: Found) -> Iterable[list[str]]:
    """Epochs of training, of models that were measured with nothing beside them."""
    known = epochs(found)
    for aim, place, most in COSTS if known else ():
        values = [value for value in known[place] if value is not None]
        if values:
            reached = (mean(values) or 0.0) <= most
            yield [aim, spread(values, 1.0), answer(reached, len(values))]
