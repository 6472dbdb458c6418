"""Write docs/parameters.md from the schema: ``python -m pipelines.reference > docs/parameters.md``.

The meaning of a parameter comes from the class docstring, its type, bounds and default from the
field, so that the page cannot say something else than the code.
"""

import inspect
import json
import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from defense.method import Method, members
from pipelines.params import Params

HEAD = """# Parameters

Everything that can be set in `params.yaml`, by section. Unknown keys are refused before a stage
computes anything. Device, tracking server and data folders come from the environment:
`DEFENSE_DEVICE` (`auto`, `cpu`, `cuda`), `MLFLOW_TRACKING_URI`, and any variable that a path
names as `$NAME`.

This page is written by `python -m pipelines.reference > docs/parameters.md`; edit the docstrings.
"""
COLUMNS = ["| key | type | default | meaning |", "|---|---|---|---|"]
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def summary(method: type) -> str:
    """Return the first sentence of a docstring, without its full stop."""
    return (inspect.getdoc(method) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")


def meanings(method: type) -> dict[str, str]:
    """Read what each attribute means from the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(method.__mro__):
        _, _, section = (inspect.getdoc(base) or "").partition("Attributes:\n")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE):
            found[name] = re.sub(r"\s+", " ", text).replace("``", "`").replace("|", "\\|")
    return found


def kind(annotation: Any) -> str:
    """Name a type as YAML users know it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(kind(part) for part in arguments)
    if origin is Annotated:
        return kind(arguments[0])
    if origin is tuple:
        return f"list of {kind(arguments[0])}"
    if annotation is type(None):
        return "null"
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return names.get(annotation, "mapping")


def row(name: str, field: FieldInfo, meaning: str) -> str:
    """Format one parameter as a line of a table."""
    bounds = [
        f"{sign} {getattr(limit, key)}"
        for limit in field.metadata
        for key, sign in BOUNDS.items()
        if hasattr(limit, key)
    ]
    value = field.get_default(call_default_factory=True)
    default = "required" if field.is_required() else f"`{json.dumps(value)}`"
    what = ", ".join([kind(field.annotation), *bounds])
    return f"| `{name}` | {what} | {default} | {meaning} |"


def table(method: type[Method]) -> list[str]:
    """Format the fields of a method, its name aside, as a table."""
    fields = {name: field for name, field in method.model_fields.items() if name != "name"}
    if not fields:
        return ["No parameters.", ""]
    text = meanings(method)
    lines = [row(name, field, text[name]) for name, field in fields.items()]
    return [*COLUMNS, *lines, ""]


def section(name: str, field: FieldInfo, meaning: str) -> list[str]:
    """Format a section: its one method, or each of the methods it chooses from."""
    lines = [f"## {name}", "", meaning, ""]
    methods = members(field.annotation)
    if not issubclass(methods[0], Method):
        return [*lines, *COLUMNS, row(name, field, meaning), ""]
    for method in methods:
        if "name" in method.model_fields:
            label = method.model_fields["name"].default
            lines += [f"### `{name}.name: {label}`", "", f"{summary(method)}.", ""]
        lines += table(method)
    return lines


def page() -> str:
    """Write the whole page."""
    text = meanings(Params)
    parts = [section(name, field, text[name]) for name, field in Params.model_fields.items()]
    return "\n".join([HEAD, *(line for part in parts for line in part)]).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
