"""The audit as one self-contained HTML page: no scripts, no links out, opens offline."""

import base64
from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined

from defense.report import AuditReport, Rate


def percent(rate: Rate) -> str:
    """Format a rate with its denominator and 95 % interval."""
    if rate.value is None:
        return "not measured (0 trials)"
    return f"{rate.value:.1%} ({rate.successes} of {rate.total}; {rate.low:.1%} to {rate.high:.1%})"


def data_uri(png: bytes) -> str:
    """Embed a PNG."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def render(report: AuditReport, pictures: Mapping[str, bytes]) -> str:
    """Render the page.

    Args:
        report: The audit.
        pictures: PNG bytes by file name, as drawn by `defense.pictures.draw`.
    """
    environment = Environment(
        loader=PackageLoader("defense"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    images = {name.removesuffix(".png"): data_uri(png) for name, png in pictures.items()}
    rules = [(report.methods["detector"]["name"], entry) for entry in report.detection]
    rules += [("delta_influence, as published", entry) for entry in report.published]
    page = environment.get_template("report.html.j2")
    return page.render(report=report, images=images, rules=rules)
