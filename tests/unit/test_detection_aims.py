"""Whether aims are reached is told from the models that were measured last, and as it is."""

from typing import Any

import pytest

from benchmarks.detection_aims import aims


def model(seed: int, **facts: Any) -> dict[str, Any]:
    scan = {"alarm": False, "tpr": None, "precision": None}
    known = {"attack": "clean", "seed": seed, "version": 2, "alone": False, "seconds": {}}
    innocent = {"inputs": 50, "alarms": 1}
    return known | {"innocent": innocent, "scan": scan, "scan_inputs": scan} | facts


def poisoned(seed: int, tpr: float, **facts: Any) -> dict[str, Any]:
    run = {"tpr": tpr, "precision": 0.98, "found": True, "inside": True}
    runs = {rate: [run, run] for rate in ("0.02", "0.05", "0.1")}
    scan = {"alarm": True, "tpr": tpr, "precision": 1.0}
    found = {"attack": "badnets_1", "investigations": runs, "scan": scan, "scan_inputs": scan}
    return model(seed, **found) | facts


def told(*models: dict[str, Any]) -> dict[str, tuple[str, str]]:
    rows = aims({str(number): one for number, one in enumerate(models)})
    return {aim: (measured, reached) for aim, measured, reached in rows}


ONE = "BadNet 1 %, one affected input: recall 98, precision 97 %"
SCAN = (
    "BadNet 1 %, scan of the training set alone: found on 90 % of models, recall and precision 95 %"
)


@pytest.mark.parametrize(
    ("recalls", "reached"),
    [
        ((0.99, 0.98, 0.97), "yes"),
        ((0.99, 0.98, 0.96), "**no**"),
        ((0.99, 0.98), "yes, on fewer than 3 models"),
    ],
)
def test_means_over_models_decide(recalls, reached: str) -> None:
    rows = told(*(poisoned(seed, tpr) for seed, tpr in enumerate(recalls)))
    assert rows[ONE][1] == reached


def test_earlier_versions_do_not_count() -> None:
    rows = told(*(poisoned(seed, 0.99) for seed in range(3)), poisoned(3, 0.1, version=1))
    assert rows[ONE] == ("99.0 ± 0.0 (3), 98.0 ± 0.0 (3)", "yes")
    assert ONE not in told(poisoned(3, 0.1, version=1), model(4))


def test_alarms_of_scans_and_inputs_are_counted() -> None:
    quiet = "clean models, scan of the training set alone: at most 1 alarm of 10"
    inputs = "clean models: alarms on at most 2 % of inputs"
    loud = {"alarm": True, "tpr": None, "precision": None}
    rows = told(*(model(seed) for seed in range(10)))
    assert rows[quiet] == ("0 of 10", "yes")
    assert rows[inputs] == ("10 of 500 (10)", "yes")
    rows = told(*(model(seed, scan=loud) for seed in range(2)), *(model(n) for n in range(2, 9)))
    assert rows[quiet] == ("2 of 9", "**no**")
    rows = told(*(poisoned(seed, 0.99) for seed in range(5)), poisoned(5, 0.99, scan=loud))
    assert rows[SCAN][1] == "**no**"  # found on all, but recall and precision are low
    missed = {"alarm": False, "tpr": None, "precision": None}
    rows = told(*(poisoned(seed, 0.99) for seed in range(8)), poisoned(8, 0.99, scan_inputs=missed))
    assert rows["BadNet 1 %, scan from untriggered inputs: found on 80 % of models"][1] == "yes"


def test_every_success_rate_after_removal_counts_and_so_does_accuracy() -> None:
    def repair(psr: float, accuracy: float) -> dict[str, Any]:
        clean = {"accuracy": 0.8, "psr": [0.01, 0.01]}
        done = {"accuracy": accuracy, "psr": [0.01, psr]}
        return {"clean": clean, "eu": done, "cf": done}

    def reached(*pairs: tuple[float, float]) -> str:
        models = (poisoned(n, 0.99, repair=repair(*pair)) for n, pair in enumerate(pairs))
        (answer,) = (row[1] for aim, row in told(*models).items() if "after EU" in aim)
        return answer

    assert reached((0.04, 0.8), (0.04, 0.8), (0.04, 0.79)) == "yes"
    assert reached((0.04, 0.8), (0.01, 0.8), (0.06, 0.8)) == "**no**"
    assert reached((0.04, 0.79), (0.04, 0.79), (0.04, 0.8)) == "**no**"


def test_times_are_of_models_that_had_the_machine_to_themselves() -> None:
    def timed(seed: int, seconds: float, *, alone: bool = True) -> dict[str, Any]:
        known = {"epoch": 10.0, "factors": 1.0, "directions": 9.0, "scan": 5.0}
        return model(seed, alone=alone, seconds=known | {"investigation": seconds})

    aim = "an investigation beyond the factors: a quarter of an epoch"
    rows = told(timed(2, 2.4), timed(3, 2.4), timed(4, 2.4), timed(5, 99.0, alone=False))
    assert rows[aim] == ("0.2 ± 0.0 (3)", "yes")
    assert told(timed(2, 2.7))[aim][1] == "**no**"


def test_intervals_hold_on_nine_tenths_of_models() -> None:
    def wide(seed: int, *, inside: bool) -> dict[str, Any]:
        run = {"tpr": 0.99, "precision": 0.98, "found": True, "inside": inside}
        return poisoned(seed, 0.99, investigations={rate: [run] for rate in ("0.05", "0.1")})

    aim = "false flags within their interval on 90 % of models, at 5 and 10 %"
    assert told(*(wide(n, inside=n > 0) for n in range(10)))[aim] == ("9 of 10, 9 of 10", "yes")
    assert told(*(wide(n, inside=n > 0) for n in range(9)))[aim][1] == "**no**"
