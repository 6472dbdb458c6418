"""Whether aims are reached is told from the models that were measured last, and as it is."""

from typing import Any

import pytest

from benchmarks.detection_aims import FAINT, FROM_ONE, NOT, SCANNED, aims

QUIET = {"alarm": False, "tpr": None, "precision": None, "blocks": [], "pointed": 0}


def model(seed: int, **facts: Any) -> dict[str, Any]:
    known = {"attack": "clean", "seed": seed, "version": 2, "alone": False, "seconds": {}}
    innocent = {"inputs": 50, "alarms": 1}
    return known | {"innocent": innocent, "scan": QUIET, "scan_inputs": QUIET} | facts


def scan(tpr: float = 0.99, precision: float = 1.0, planted: int = 9, pointed: int = 0) -> dict:
    block = {"suspected": True, "planted": planted}
    found = {"alarm": True, "tpr": tpr, "precision": precision, "pointed": pointed}
    return found | {"blocks": [{"suspected": False, "planted": 0}, block]}


def poisoned(seed: int, tpr: float = 0.99, precision: float = 0.98, **facts: Any) -> dict[str, Any]:
    run = {"tpr": tpr, "precision": precision, "found": True, "inside": True}
    runs = {rate: [run, run] for rate in ("0.02", "0.05", "0.1")}
    found = {"attack": "badnets_1", "investigations": runs, "scan": scan(), "scan_inputs": scan()}
    return model(seed, **found) | facts


def told(*models: dict[str, Any]) -> dict[str, tuple[str, str]]:
    rows = aims({str(number): one for number, one in enumerate(models)})
    return {aim: (measured, reached) for aim, measured, reached in rows}


def one(title: str, models: list[dict[str, Any]]) -> tuple[str, str]:
    """Take the only row whose aim has some words."""
    (row,) = (row for aim, row in told(*models).items() if title in aim)
    return row


@pytest.mark.parametrize(
    ("rates", "reached"),
    [
        ([(0.99, 0.98), (0.98, 0.98), (0.97, 0.98)], "yes"),
        ([(0.99, 0.98), (0.98, 0.98), (0.96, 0.98)], "**no**"),
        ([(0.99, 0.98), (0.99, 0.96), (0.99, 0.96)], "**no**"),
        ([(0.99, 0.98), (0.98, 0.98)], "yes, on fewer than 3 models"),
    ],
)
def test_means_over_models_decide(rates, reached: str) -> None:
    models = [poisoned(seed, *pair) for seed, pair in enumerate(rates)]
    assert one("BadNet 1 %, one affected input", models)[1] == reached


@pytest.mark.parametrize("attack", FROM_ONE)
def test_every_attack_has_bounds_of_its_own(attack: str) -> None:
    recall, precision = FROM_ONE[attack]
    wanted = f"recall {100 * recall:.0f}, precision {100 * precision:.0f} %"
    for less, reached in (((0, 0), "yes"), ((0.01, 0), "**no**"), ((0, 0.01), "**no**")):
        rates = recall + 0.001 - less[0], precision + 0.001 - less[1]
        rows = told(*(poisoned(seed, *rates, attack=attack) for seed in range(3)))
        (answer,) = (row[1] for aim, row in rows.items() if row[0] != "not measured"
                     and aim.endswith(wanted))  # fmt: skip
        assert answer == reached


def test_bounds_are_those_that_were_set_out() -> None:
    least = {"badnets_1": (0.98, 0.97), "smooth_1": (0.98, 0.97), "blended_1": (0.98, 0.97)}
    few = {"badnets_025": (0.93, 0.95), "smooth_025": (0.93, 0.95)}
    assert least | few | {"badnets_all": (0.95, 0.9), "two": (0.95, 0.9)} == FROM_ONE


def test_a_later_version_replaces_an_earlier_one_which_is_marked() -> None:
    earlier = [poisoned(seed, 0.1, version=1) for seed in range(3)]
    models = [*(poisoned(seed) for seed in range(3)), *earlier]
    aim = "BadNet 1 %, one affected input"
    assert one(aim, models) == ("99.0 ± 0.0 (3), 98.0 ± 0.0 (3)", "yes")
    assert one(aim, [*earlier, model(4)]) == ("10.0 ± 0.0 (3), 98.0 ± 0.0 (3) †", "**no**")


def test_a_later_version_with_too_few_models_does_not_replace_an_earlier_one() -> None:
    earlier = [poisoned(seed, 0.1, version=1) for seed in range(4)]
    aim, marked = "BadNet 1 %, one affected input", "98.0 ± 0.0"
    for few in (1, 2):
        found = one(aim, [*earlier, *(poisoned(seed) for seed in range(few))])
        assert found == (f"10.0 ± 0.0 (4), {marked} (4) †", "**no**")
    latest = one(aim, [earlier[0], poisoned(0)])
    assert latest == ("99.0 (1), 98.0 (1)", "yes, on fewer than 3 models")


def test_what_was_not_measured_is_said() -> None:
    rows = told(model(2))
    assert rows["two attacks: their inputs make two incidents"] == tuple(NOT)
    assert len(rows) == len(told(*(poisoned(seed) for seed in range(3))))
    assert aims({}) == []


def test_attacks_are_told_apart_in_two_incidents_that_mix_nothing() -> None:
    aim = "two attacks: their inputs make two incidents"

    def apart(*pairs: tuple[int, int]) -> tuple[str, str]:
        told_apart = [{"inputs": 20, "incidents": many, "mixed": mixed} for many, mixed in pairs]
        return one(aim, [poisoned(n, attack="two", apart=a) for n, a in enumerate(told_apart)])

    assert apart((2, 0), (2, 0), (2, 0)) == ("3 of 3", "yes")
    assert apart((2, 0), (2, 0), (3, 0)) == ("2 of 3", "**no**")
    assert apart((2, 0), (2, 0), (2, 1)) == ("2 of 3", "**no**")


def test_alarms_on_inputs_and_of_scans_of_clean_models_are_counted() -> None:
    inputs = "clean models: alarms on at most 2 % of inputs"
    assert one(inputs, [model(seed) for seed in range(10)]) == ("10 of 500 (10)", "yes")
    loud = {"inputs": 50, "alarms": 2}
    assert one(inputs, [model(2, innocent=loud), model(3)])[1] == "**no**"
    for kind, words in (("scan", "training set alone"), ("scan_inputs", "untriggered inputs")):
        aim = f"clean models, scan {'of the' if kind == 'scan' else 'from'} {words}"
        quiet = [model(seed) for seed in range(10)]
        assert one(aim, quiet) == ("0 of 10", "yes")
        assert one(aim, [model(11, **{kind: scan()}), *quiet[1:]])[1] == "yes"
        assert one(aim, [model(11, **{kind: scan()}), *quiet[:8]])[1] == "**no**"


@pytest.mark.parametrize(
    ("attack", "kind", "most"),
    [(attack, "scan", 1) for attack in (*SCANNED, *FAINT)]
    + [(attack, "scan_inputs", 2) for attack in SCANNED],
)
def test_a_scan_may_miss_few_models(attack: str, kind: str, most: int) -> None:
    title = {"scan": "training set alone", "scan_inputs": "untriggered inputs"}[kind]

    def reached(missed: int, what: dict[str, Any]) -> str:
        models = [poisoned(n, attack=attack) for n in range(100 - missed, 110 - 2 * missed)]
        models += [poisoned(n, attack=attack, **{kind: what}) for n in range(missed)]
        rows = [row for aim, row in told(*models).items() if title in aim]
        (row,) = (measured for measured in rows if measured[0].startswith(f"{10 - missed} of 10"))
        return row[1]

    for what in (scan(planted=0), QUIET | {"tpr": 0.99, "precision": 0.99}):
        assert reached(most, what) == "yes"
        assert reached(most + 1, what) == "**no**"


def test_recall_and_precision_of_a_scan_count_and_inputs_that_point_are_told() -> None:
    title = "BadNet 1 %, scan of the training set alone"
    for found, reached in (
        ((0.951, 0.951), "yes"),
        ((0.94, 1.0), "**no**"),
        ((1.0, 0.94), "**no**"),
    ):
        models = [poisoned(seed, scan=scan(*found)) for seed in range(3)]
        assert one(title, models)[1] == reached
    models = [poisoned(seed, scan_inputs=scan(pointed=seed)) for seed in range(3)]
    row = one("BadNet 1 %, scan from untriggered inputs", models)
    assert row == ("3 of 3; inputs point to it on 2", "yes")


def test_every_success_rate_after_removal_counts_and_so_does_mean_accuracy() -> None:
    def repair(psr: float, accuracy: float) -> dict[str, Any]:
        done = {"accuracy": accuracy, "psr": [0.01, psr]}
        nothing = {"accuracy": 0.8, "psr": [0.9, 0.9]}
        return {"clean": {"accuracy": 0.8, "psr": [0.01, 0.01]}, "eu": done, "cf": nothing}

    def reached(*pairs: tuple[float, float]) -> str:
        models = [poisoned(n, repair=repair(*pair)) for n, pair in enumerate(pairs)]
        assert one("BadNet 1 %, after CF", models)[1] == "**no**"
        return one("BadNet 1 %, after EU", models)[1]

    assert reached((0.04, 0.8), (0.04, 0.8), (0.04, 0.79)) == "yes"
    assert reached((0.04, 0.8), (0.01, 0.8), (0.06, 0.8)) == "**no**"
    assert reached((0.04, 0.79), (0.04, 0.79), (0.04, 0.8)) == "**no**"


def test_times_are_of_models_that_had_the_machine_to_themselves() -> None:
    def timed(seed: int, investigation: float, scan: float, *, alone: bool = True) -> dict:
        known = {"epoch": 10.0, "factors": 1.0, "directions": 9.0, "scan": scan}
        return model(seed, alone=alone, seconds=known | {"investigation": investigation})

    aims_of = "an investigation beyond", "a scan of all classes, with factors and directions"
    for times, reached in (((2.4, 19.0), "yes"), ((2.7, 21.0), "**no**")):
        models = [timed(seed, *times) for seed in range(3)] + [timed(5, 99.0, 99.0, alone=False)]
        assert [one(aim, models)[1] for aim in aims_of] == [reached, reached]
    assert one(aims_of[1], [timed(2, 2.4, 19.0)])[0] == "2.9 (1)"


def test_intervals_hold_on_nine_tenths_of_investigations() -> None:
    def wide(seed: int, *held: bool) -> dict[str, Any]:
        runs = [{"tpr": 0.99, "precision": 0.98, "found": True, "inside": one} for one in held]
        return poisoned(seed, investigations=dict.fromkeys(("0.05", "0.1"), runs))

    aim = "false flags within their interval"
    others = [wide(2, *[True] * 4), wide(3, *[True] * 5)]
    assert one(aim, [wide(1, False), *others]) == ("9 of 10, 9 of 10 (3)", "yes")
    assert one(aim, [wide(1, False, False), *others])[1] == "**no**"
    few = [wide(1, *[True] * 20)]
    assert one(aim, few) == ("20 of 20, 20 of 20 (1)", "yes, on fewer than 3 models")


@pytest.mark.parametrize(
    ("left", "reached"), [(0.4, "yes, on fewer than 3 models"), (0.3, "**no**")]
)
def test_a_third_of_the_flags_is_too_few_if_half_of_the_success_is_left(left, reached: str) -> None:
    title = "SIG 1 %, after EU without a third of the flags"
    part = {"psr": [0.0], "accuracy": 0.8}
    repair = {"clean": part, "eu": part, "cf": part}
    asked = poisoned(2, attack="sig_1", psr=[0.7], repair=repair | {"third": {"psr": [left]}})
    before = poisoned(3, attack="sig_1", psr=[0.7], repair=repair)  # of before it was asked
    assert one(title, [asked, before]) == (f"{100 * left:.1f} (1)", reached)
    assert one(title, [before]) == tuple(NOT)
