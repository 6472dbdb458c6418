"""The shape of the code: layers that only point down, and stages that name all they run."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

# A module may import its own floor's package mates and anything below, never above.
FLOORS = (
    {"defense.errors", "defense.machine", "defense.method"},
    {"defense.artifacts", "defense.recipe", "defense.report"},
    {"defense.evidence", "defense.records", "defense.compute"},
    {"defense.checkpoints", "defense.phases", "defense.statistics"},
    {
        "defense.storage",
        "defense.prediction",
        "defense.training",
        "defense.gate",
        "defense.lineage",
        "defense.metrics",
    },
    {"defense.contracts"},
    {
        "defense.attacks",
        "defense.datasets",
        "defense.detectors",
        "defense.influence",
        "defense.models",
        "defense.unlearning",
        "defense.html",
        "defense.labels",
        "defense.pictures",
        "defense.audit",
        "defense.confirmation",
        "defense.tracking",
    },
    {"defense.victim"},
    {"defense.independent"},
    {"defense.scan"},
    {"defense.scanning"},
    {"defense.cli"},
    {"pipelines.params", "pipelines.paths"},
    {"pipelines.stages"},
    {"pipelines.matrix"},
    {"pipelines.__main__", "pipelines.reference", "pipelines.adopt"},
)
EARLY = {"train": {"factors"}}  # read to refuse before a training; no output depends on it
SECTIONS = {
    "data": "datasets",
    "attack": "attacks",
    "model": "models",
    "detector": "detectors",
    "unlearner": "unlearning",
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*packages: str) -> dict[str, Path]:
    files = (file for name in packages for file in sorted((ROOT / name).rglob("*.py")))
    return {module_name(file): file for file in files}


SOURCES = sources("defense", "pipelines")
ALL_SOURCES = SOURCES | sources("benchmarks", "tests")


def imports(module: str) -> set[str]:
    """List the modules of this project that a module imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in SOURCES}


def floor(module: str) -> int:
    for number, names in enumerate(FLOORS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return number
    raise AssertionError(f"{module} has no floor: add it to FLOORS")


def package(module: str) -> str:
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("module", [m for m in SOURCES if "." in m])
def test_imports_only_point_down(module: str) -> None:
    for other in imports(module) - {"defense", "pipelines"}:
        if package(other) != package(module):
            assert floor(other) <= floor(module), f"{module} imports {other}"
            same_floor = floor(other) == floor(module)
            assert not same_floor or package(module) not in {
                package(name) for name in imports(other)
            }, f"{module} and {other} import each other"


def test_only_tracking_imports_mlflow() -> None:
    users = {
        name
        for name, file in SOURCES.items()
        if "import mlflow" in file.read_text("utf-8") or "from mlflow" in file.read_text("utf-8")
    }
    assert users == {"defense.tracking"}


@pytest.mark.parametrize("module", ALL_SOURCES)
def test_files_and_functions_are_small(module: str) -> None:
    text = ALL_SOURCES[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines < 40, f"{module}.{node.name} has {lines} lines"


def closure(starts: set[str]) -> set[str]:
    """List everything a set of modules runs, the parameter schema aside."""
    seen: set[str] = set()
    todo = set(starts)
    while todo:
        module = todo.pop()
        if module in seen or module == "pipelines.params":
            continue
        seen.add(module)
        parents = {module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1)}
        todo |= imports(module) | (parents & SOURCES.keys())
    return seen


def runs_code(module: str) -> bool:
    """Tell whether a file holds more than a docstring."""
    return len(ast.parse(SOURCES[module].read_text(encoding="utf-8")).body) > 1


STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def test_the_page_on_the_architecture_has_the_same_floors() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| \d+ \| (.*?) \|", text, re.MULTILINE)
    told = [{f"defense.{name}" for name in re.findall(r"`(\w+)`", row)} for row in rows]
    assert told[:-1] == [floor for floor in FLOORS if min(floor).startswith("defense.")]


@pytest.mark.parametrize("stage", STAGES)
def test_stage_names_all_the_code_it_depends_on(stage: str) -> None:
    declared = STAGES[stage]
    methods = {SECTIONS[name] for name in declared["params"] if name in SECTIONS}
    if stage == "audit":  # reports the settings of methods it does not run
        methods = {"models"}
    starts = {f"defense.{name}" for name in methods} | {f"pipelines.stages.{stage}"}
    needed = {SOURCES[name] for name in closure(starts) if runs_code(name)}
    needed.add(SOURCES["pipelines.__main__"])
    listed = [ROOT / dep.removeprefix("${code}/") for dep in declared["deps"]]
    missing = [
        file for file in needed if not any(file == dep or dep in file.parents for dep in listed)
    ]
    assert missing == []
    code = [dep for dep in listed if dep.relative_to(ROOT).parts[0] in ("defense", "pipelines")]
    assert [dep for dep in code if not dep.exists()] == []
    unused = [
        dep
        for dep in code
        if dep.name != "templates" and not any(f == dep or dep in f.parents for f in needed)
    ]
    assert unused == [], "a dependency that is not used makes the stage run for nothing"


def test_stage_params_are_sections_and_cover_what_it_reads() -> None:
    for stage, declared in STAGES.items():
        text = SOURCES[f"pipelines.stages.{stage}"].read_text("utf-8")
        if "load_model" in text:
            text += "params.model"
        used = {
            node.attr
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "params"
        } - {"model_dump"}
        assert used - EARLY.get(stage, set()) <= set(declared["params"]), stage


def test_both_pipelines_have_the_same_stages() -> None:
    other = yaml.safe_load((ROOT / "pipelines" / "cifar10" / "dvc.yaml").read_text())
    assert other["stages"] == STAGES
    assert other["vars"] == [{"code": "../.."}]
