"""What the detector is meant to reach, and whether the models measured last reach it."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.detection_rows import (
    FEWEST,
    NONE,
    TITLES,
    Models,
    epochs,
    mark_of,
    mean,
    runs_held,
    runs_of,
    runs_with_flags,
    spread,
    version,
)

Found = list[dict[str, Any]]

FROM_ONE = {  # recall and precision from one affected input
    "badnets_1": (0.98, 0.97),
    "smooth_1": (0.98, 0.97),
    "blended_1": (0.98, 0.97),
    "badnets_025": (0.93, 0.95),
    "smooth_025": (0.93, 0.95),
    "badnets_all": (0.95, 0.9),
    "two": (0.95, 0.9),
}
SCANNED = ("badnets_1", "smooth_1", "blended_1")
FAINT = ("badnets_025", "smooth_025", "blended_025")  # of which only what a scan finds is asked
REPAIRED = (*FROM_ONE, "sig_1")
COSTS = (  # which of `PARTS`, and how many epochs at most
    ("an investigation beyond factors and directions: a quarter of an epoch", 1, 0.25),
    ("a scan of all classes, with factors and directions: 3 epochs", 2, 3.0),
)
KINDS = {"scan": "scan of the training set alone", "scan_inputs": "scan from untriggered inputs"}
HEAD = ["aim", "measured (models)", "reached"]
NOT = ["not measured", NONE]


def answer(reached: bool, models: int) -> str:
    """Say whether an aim is reached, or that the models are too few to say so."""
    if not reached:
        return "**no**"
    return "yes" if models >= FEWEST else f"yes, on fewer than {FEWEST} models"


def aims(models: Models) -> list[list[str]]:
    """Compare what was measured with every aim; a row for each.

    Each is of the latest version of the detector that was asked on enough models, or else on most,
    marked if that is not the last.
    """
    rows = [
        *(_from_one(models, attack, *least) for attack, least in FROM_ONE.items()),
        _apart(models),
        _alarms(models),
        _intervals(models),
        *(_repaired(models, attack, name) for attack in REPAIRED for name in ("eu", "cf")),
        _needed(models, "sig_1"),
        *(_scanned(models, attack, "scan") for attack in (*SCANNED, *FAINT)),
        *(_scanned(models, attack, "scan_inputs") for attack in SCANNED),
        *(_silent(models, kind) for kind in KINDS),
        *(_cost(models, *cost) for cost in COSTS),
    ]
    return rows if models else []


def _latest(
    models: Models, attacks: Iterable[str], measured: Callable[[dict[str, Any]], Any]
) -> tuple[Found, str]:
    """Pick the models of some attacks that have a figure, of one version; mark an earlier one.

    It is the last version with enough models, or else the one with most: a single model after a
    change says less than eight before it.
    """
    chosen = [one for one in models.values() if one["attack"] in attacks and measured(one)]
    counts = Counter(map(version, chosen))
    known = max(counts, key=lambda one: (min(counts[one], FEWEST), one), default=0)
    return [one for one in chosen if version(one) == known], mark_of(known, models)


def _from_one(models: Models, attack: str, recall: float, precision: float) -> list[str]:
    found, mark = _latest(models, (attack,), lambda model: runs_of([model], "0.05"))
    least = f"recall {100 * recall:.0f}, precision {100 * precision:.0f} %"
    aim = f"{TITLES[attack]}, one affected input: {least}"
    if not found:
        return [aim, *NOT]
    runs = runs_of(found, "0.05")
    rates = [[mean(run[key] for run in own) for own in runs] for key in ("tpr", "precision")]
    reached = (mean(rates[0]) or 0) >= recall and (mean(rates[1]) or 0) >= precision
    return [aim, f"{spread(rates[0])}, {spread(rates[1])}{mark}", answer(reached, len(runs))]


def _apart(models: Models) -> list[str]:
    found, mark = _latest(models, ("two",), lambda model: "apart" in model)
    aim = "two attacks: their inputs make two incidents"
    if not found:
        return [aim, *NOT]
    told = [model["apart"] for model in found]
    right = sum(one["incidents"] == 2 and not one["mixed"] for one in told)
    return [aim, f"{right} of {len(told)}{mark}", answer(right == len(told), len(told))]


def _alarms(models: Models) -> list[str]:
    found, mark = _latest(models, ("clean",), lambda model: model["innocent"]["inputs"])
    aim = "clean models: alarms on at most 2 % of inputs"
    if not found:
        return [aim, *NOT]
    asked = sum(model["innocent"]["inputs"] for model in found)
    alarms = sum(model["innocent"]["alarms"] for model in found)
    shown = f"{alarms} of {asked} ({len(found)}){mark}"
    return [aim, shown, answer(alarms <= 0.02 * asked, len(found))]


def _intervals(models: Models) -> list[str]:
    found, mark = _latest(models, TITLES, lambda model: runs_with_flags([model], "0.05"))
    aim = "false flags within their interval on 90 % of investigations that flag any, at 5 and 10 %"
    if not found:
        return [aim, *NOT]
    held = [runs_held(found, rate) for rate in ("0.05", "0.1")]
    shown = ", ".join(f"{inside} of {known}" for inside, known in held)
    reached = all(inside >= 0.9 * known for inside, known in held)
    flagging = len(runs_with_flags(found, "0.05"))
    return [aim, f"{shown} ({flagging}){mark}", answer(reached, flagging)]


def _repaired(models: Models, attack: str, name: str) -> list[str]:
    found, mark = _latest(models, (attack,), lambda model: model.get("repair"))
    aim = (
        f"{TITLES[attack]}, after {name.upper()}: every PSR below 5 %, on average accuracy within "
        "0.5 points of a model without the poison"
    )
    if not found:
        return [aim, *NOT]
    parts = [model["repair"] for model in found]
    success = [rate for part in parts for rate in part[name]["psr"]]
    without = [rate for part in parts for rate in part["clean"]["psr"]]
    lost = [part["clean"]["accuracy"] - part[name]["accuracy"] for part in parts]
    shown = f"PSR {spread(success)}, without poison {spread(without)}; lost {spread(lost)}{mark}"
    reached = max(success) < 0.05 and (mean(lost) or 0.0) <= 0.005
    return [aim, shown, answer(reached, len(parts))]


def _needed(models: Models, attack: str) -> list[str]:
    """Say whether far fewer rows than the flags would do: not if a third of them does not."""
    found, mark = _latest(models, (attack,), lambda model: "third" in (model.get("repair") or {}))
    aim = f"{TITLES[attack]}, after EU without a third of the flags: half of the PSR is still there"
    if not found:
        return [aim, *NOT]
    after = [one["repair"]["third"]["psr"] for one in found]
    alive = all(max(left) >= max(one["psr"]) / 2 for one, left in zip(found, after, strict=True))
    return [aim, spread(rate for left in after for rate in left) + mark, answer(alive, len(found))]


def _scanned(models: Models, attack: str, kind: str) -> list[str]:
    """Found is an alarm by a block that holds poison, whether inputs or rows led to it."""
    found, mark = _latest(models, (attack,), lambda model: model.get(kind))
    share, strict = (0.9, attack not in FAINT) if kind == "scan" else (0.8, False)
    aim = f"{TITLES[attack]}, {KINDS[kind]}: found on {100 * share:.0f} % of models"
    aim += ", recall and precision 95 %" if strict else ""
    if not found:
        return [aim, *NOT]
    parts = [model[kind] for model in found]
    hits = sum(any(b["suspected"] and b["planted"] for b in part["blocks"]) for part in parts)
    reached, shown = hits >= share * len(parts), f"{hits} of {len(parts)}"
    if kind == "scan_inputs":
        shown += f"; inputs point to it on {sum(part['pointed'] > 0 for part in parts)}"
    if strict:
        rates = [[part[key] or 0.0 for part in parts] for key in ("tpr", "precision")]
        shown += f"; {spread(rates[0])}, {spread(rates[1])}"
        reached = reached and all((mean(values) or 0.0) >= 0.95 for values in rates)
    return [aim, shown + mark, answer(reached, len(parts))]


def _silent(models: Models, kind: str) -> list[str]:
    found, mark = _latest(models, ("clean",), lambda model: model.get(kind))
    aim = f"clean models, {KINDS[kind]}: at most 1 alarm of 10"
    if not found:
        return [aim, *NOT]
    alarms = sum(model[kind]["alarm"] for model in found)
    return [aim, f"{alarms} of {len(found)}{mark}", answer(alarms <= 0.1 * len(found), len(found))]


def _cost(models: Models, aim: str, place: int, most: float) -> list[str]:
    """Epochs of training, of models that were measured with nothing beside them."""
    found, mark = _latest(models, TITLES, lambda model: any(epochs([model])[place : place + 1]))
    values = [value for value in (epochs(found) or [[]] * 4)[place] if value is not None]
    if not values:
        return [aim, *NOT]
    reached = (mean(values) or 0.0) <= most
    return [aim, spread(values, 1.0) + mark, answer(reached, len(values))]
