"""The tables of docs/detection.md."""

from benchmarks.detection_aims import HEAD, aims
from benchmarks.detection_rows import (
    LEGEND,
    OLDER,
    UNUSUAL,
    Models,
    controlled,
    each,
    investigated,
    labels,
    repairs,
    scans,
    several,
    table,
    times,
    unusual,
    whole,
)


def page(models: Models) -> str:
    """Write all tables."""
    scan_head = ["attack", "models with an alarm", "recall", "precision", "natural blocks"]
    from_inputs = [*scan_head, "models where inputs point to a block"]
    one = ["attack", "PSR", "found", "recall", "precision", "attacks told apart",
           "alarms on innocent inputs"]  # fmt: skip
    joint = [f"{what}, {count}" for count in (1, 5, 10, 100)
             for what in ("recall", "precision", "an incident per attack")]  # fmt: skip
    rates = [f"{what} at {rate} %" for rate in (2, 5, 10) for what in ("false flags", "inside")]
    classes = ["attack", "poisoned classes found", "recall", "precision", "inside",
               "alarms on clean classes"]  # fmt: skip
    after = ["attack", "PSR without poison", "PSR after EU", "accuracy lost by EU", "PSR after CF",
             "accuracy lost by CF"]  # fmt: skip
    wrong = ["rows", "wrong labels fitted", "average precision of the list", "of self-influence",
             "of the loss", "true label suggested"]  # fmt: skip
    cost = ["attack", "factors and directions", "investigation beyond these", "scan with both",
            "scan from 10,000 inputs with both"]  # fmt: skip
    other = ["suspect", "accuracy", "PSR", "inputs that find it", "recall", "precision",
             "classes as a whole that are found", "recall", "precision", "scans with an alarm",
             "recall", "precision", "alarms on innocent inputs"]  # fmt: skip
    parts = (
        ("Aims", HEAD, aims(models)),
        ("One affected input", one, each(models, investigated)),
        ("Several affected inputs", ["attack", *joint], each(models, several)),
        ("False discoveries", ["attack", *rates], each(models, controlled)),
        ("A class as a whole", classes, each(models, whole)),
        ("After removal", after, each(models, repairs)),
        ("Scan of the training set alone", scan_head, each(models, scans("scan"))),
        ("Scan from untriggered inputs", from_inputs, each(models, scans("scan_inputs"))),
        ("Wrong labels", wrong, each(models, labels)),
        ("Other triggers, data and networks", other, each(models, unusual, UNUSUAL)),
        ("Cost in epochs", cost, each(models, times)),
    )
    text = "\n".join(f"### {title}\n\n{table(head, rows)}" for title, head, rows in parts if rows)
    return text + (LEGEND if OLDER in text else "")
