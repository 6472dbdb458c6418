"""Pictures of an audit as PNG bytes that are the same on every run."""

import io
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve

from defense.evidence import FoundBlock, LabelDoubts, Scan
from defense.metrics import ranking
from defense.records import Flags, ImageSet, Truth
from defense.report import AuditReport, ConfirmationCurve, Rate

SHOWN = 10  # images per grid
BAD, GOOD, NEUTRAL = "#b3261e", "#1b6e3c", "#5f6b7a"


def draw(
    report: AuditReport, train: ImageSet, affected: ImageSet, flags: Flags, truth: Truth
) -> dict[str, bytes]:
    """Draw every picture of a report: file name to PNG bytes."""
    curve = report.confirmation
    tried = curve is not None and curve.points
    return ({"confirmation.png": _confirmation(curve)} if curve and tried else {}) | {
        "affected.png": _affected(affected, report),
        "most_suspicious.png": _rows(train, flags, truth, suspicious=True),
        "clean_contrast.png": _rows(train, flags, truth, suspicious=False),
        "suspicion.png": _histogram(flags, truth),
        "precision_recall.png": _precision_recall(flags, truth),
        "before_after.png": _before_after(report),
    }


def sheets(scan: Scan, train: ImageSet) -> dict[str, bytes]:
    """Draw some rows of every block: file name to PNG bytes."""
    return {
        f"block_{number}.png": _contact_sheet(
            train, np.flatnonzero(block.rows), block_title(block, train)
        )
        for number, block in enumerate(scan.blocks)
    }


def doubtful(doubts: LabelDoubts, train: ImageSet) -> bytes:
    """Show the rows whose labels are doubted most."""
    rows, names = doubts.doubtful(SHOWN), train.class_names
    figure, axes = _grid(len(rows), "Rows whose label others contradict: label / suggested")
    for place, row in enumerate(rows):
        title = f"{names[train.labels[row]]} / {names[doubts.suggested[row]]}"
        _show(axes[place], train.uint8(slice(row, row + 1))[0], title)
    return _png(figure)


def block_title(block: FoundBlock, train: ImageSet) -> str:
    """Say in one line what a block is."""
    names = train.class_names
    usual = "unknown" if block.usual_agreement is None else f"{block.usual_agreement:.0%}"
    lack = "" if not block.lacking else " have in common what clean inputs lack"
    return (
        f"{block.judged}: {block.rows.sum():,} rows labelled {names[block.label]}{lack}; a model "
        f"that never saw them agrees with {block.agreement:.0%} (usually "
        f"{usual}), says {names[block.said]} of {block.said_share:.0%}"
        + ("" if not block.alike else f"; clean inputs cohere, too: {', '.join(block.alike)}")
    )


def _contact_sheet(train: ImageSet, rows: NDArray[np.int64], caption: str) -> bytes:
    """Show some of the rows, spread evenly over all, as PNG bytes."""
    shown = rows[np.linspace(0, len(rows) - 1, min(len(rows), SHOWN)).astype(np.int64)]
    figure, axes = _grid(len(shown), textwrap.fill(caption, 70))
    for place, row in enumerate(shown):
        title = f"row {row}: {train.class_names[train.labels[row]]}"
        _show(axes[place], train.uint8(slice(row, row + 1))[0], title)
    return _png(figure)


def _confirmation(curve: ConfirmationCurve) -> bytes:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(curve.before, color="black", lw=0.8, ls=":", label="before")
    for name, colour, label in (("flagged", GOOD, "flagged"), ("others", NEUTRAL, "unflagged")):
        known = [(point.rows, getattr(point, name)) for point in curve.points]
        shown = [pair for pair in known if pair[1] is not None]
        if shown:
            axes.plot(*zip(*shown, strict=True), "o-", color=colour, label=f"{label} rows unlearnt")
    axes.set(xscale="log", ylim=(-0.02, 1.02), xlabel="rows", ylabel="probability of wrong label")
    rows = [point.rows for point in curve.points]
    axes.set_xticks(rows, [f"{count:,}" for count in rows])
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=8)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _show(axes: Axes, pixels: NDArray[np.uint8], title: str, colour: str = "black") -> None:
    image = pixels.transpose(1, 2, 0)
    grey = image.shape[2] == 1
    axes.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=255)
    axes.set_title(title, fontsize=8, color=colour)
    axes.set_axis_off()


def _grid(count: int, caption: str) -> tuple[Figure, list[Axes]]:
    columns = min(count, 5)
    lines = -(-count // columns)
    figure = Figure(figsize=(1.5 * max(columns, 3), 1.75 * lines + 0.6), layout="constrained")
    figure.suptitle(caption, fontsize=10)
    axes = [figure.add_subplot(lines, columns, place + 1) for place in range(count)]
    return figure, axes


def _affected(affected: ImageSet, report: AuditReport) -> bytes:
    shown = min(len(affected), SHOWN)
    figure, axes = _grid(shown, "Affected input: predicted / true class")
    for place in range(shown):
        entry = report.affected[place]
        title = f"{entry.predicted} / {entry.true or 'unknown'}"
        _show(axes[place], affected.uint8(slice(place, place + 1))[0], title, BAD)
    return _png(figure)


def _rows(train: ImageSet, flags: Flags, truth: Truth, *, suspicious: bool) -> bytes:
    """Show the most suspicious rows, or the least suspicious with the same label."""
    pool = np.flatnonzero(flags.candidates if suspicious else flags.predicted_label)
    keys = -flags.suspicion[pool] if suspicious else flags.suspicion[pool]
    rows = pool[np.argsort(keys, kind="stable")][:SHOWN]
    caption = "Most suspicious rows" if suspicious else "Least suspicious rows of the same label"
    figure, axes = _grid(len(rows), f"{caption} (red: planted)")
    for place, row in enumerate(rows):
        title = f"row {row}: {train.class_names[train.labels[row]]}"
        colour = BAD if truth.poisoned[row] else "black"
        _show(axes[place], train.uint8(slice(row, row + 1))[0], title, colour)
    return _png(figure)


def _histogram(flags: Flags, truth: Truth) -> bytes:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    groups = {
        "planted": (truth.poisoned, BAD),
        "clean, predicted label": (flags.predicted_label & ~truth.poisoned, NEUTRAL),
        "clean, other labels": (~flags.predicted_label & ~truth.poisoned, GOOD),
    }
    largest = max(float(np.abs(flags.suspicion).max()), 1e-12)
    edges = _symmetric_log_edges(largest)
    for name, (mask, colour) in groups.items():
        axes.hist(flags.suspicion[mask], edges, histtype="step", color=colour, label=name, lw=1.6)
    axes.axvline(flags.threshold, color="black", lw=1, ls="--", label="threshold")
    axes.set(yscale="log", xlabel="suspicion", ylabel="training rows")
    axes.set_xscale("symlog", linthresh=edges[len(edges) // 2 + 1])
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(fontsize=8)
    return _png(figure)


def _symmetric_log_edges(largest: float) -> list[float]:
    """Bin edges over three decades on both sides of zero."""
    positive = largest * np.logspace(-3, 0, 25)
    return [*-positive[::-1], 0.0, *positive]


def _precision_recall(flags: Flags, truth: Truth) -> bytes:
    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    everything = np.ones_like(flags.candidates)
    for name, rows, colour in (
        ("predicted label", flags.predicted_label, BAD),
        ("all rows", everything, NEUTRAL),
    ):
        order = ranking(flags, rows)
        precision, recall, _ = precision_recall_curve(truth.poisoned, order)
        axes.plot(recall, precision, drawstyle="steps-post", color=colour, label=name)
        flagged = rows & (flags.suspicion > flags.threshold)
        hits = (flagged & truth.poisoned).sum()
        point = hits / truth.poisoned.sum(), hits / max(flagged.sum(), 1)
        axes.plot(*point, "o", color=colour)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="recall (TPR)", ylabel="precision")
    axes.set_title("Dots: the rule's own threshold", fontsize=9)
    axes.legend(fontsize=8)
    return _png(figure)


def _before_after(report: AuditReport) -> bytes:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    names = {"psr": "poison success", "clean_accuracy": "clean accuracy"}
    names["robust_accuracy"] = "robust accuracy"
    for offset, label, quality, colour in (
        (-0.2, "before", report.before, BAD),
        (0.2, "after", report.after, GOOD),
    ):
        rates: list[Rate] = [getattr(quality, name) for name in names]
        values = np.array([rate.value or 0.0 for rate in rates])
        ends = np.array([[rate.low for rate in rates], [rate.high for rate in rates]])
        error = np.abs(ends - values)
        places = np.arange(len(names)) + offset
        bars = axes.bar(places, values, 0.38, yerr=error, capsize=3, color=colour, label=label)
        shares = ["not measured" if rate.value is None else f"{rate.value:.1%}" for rate in rates]
        axes.bar_label(bars, shares, fontsize=8, padding=2)
    axes.set_xticks(np.arange(len(names)), list(names.values()))
    axes.set(ylim=(0, 1.15), ylabel="share, with 95 % interval")
    axes.legend(fontsize=8, loc="upper center", ncols=2)
    return _png(figure)
