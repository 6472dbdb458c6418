"""The matrix of runs: every cell's parameters are valid, and its folders and code are right."""

from pathlib import Path

import pytest
import yaml

from benchmarks.parallel import fill, items
from defense.errors import DefenseError
from pipelines.matrix import read_cell, settings_of
from pipelines.paths import REFERENCES

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "pipelines" / "paper"
FILE = yaml.safe_load((PAPER / "dvc.yaml").read_text())
LISTS = FILE["vars"][1]["of"]
STAGES = FILE["stages"]
ROOT_STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
METHODS = ("attacks", "detectors", "unlearning")


def cells(stage: str) -> list[dict]:
    """List the items of a stage's matrix."""
    return [*items(STAGES[stage]["matrix"], LISTS)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_cell_has_valid_parameters_and_its_own_outputs(stage: str) -> None:
    declared, seen = STAGES[stage], set()
    for item in cells(stage):
        cell = fill(declared["cmd"], item).rsplit(" ", 1)[1]
        params, paths = read_cell(PAPER / "params.yaml", cell, stage.split("_")[0])
        parts = cell.split("/")
        assert params.seed == int(parts[1])
        if len(parts) > 2:
            assert params.attack.name == parts[2]
        folders = {str(value) for value in vars(paths).values()}
        for out in declared["outs"]:
            place = fill(next(iter(out)), item)
            assert place not in seen
            seen.add(place)
            assert (
                place.split("/artifacts/")[0].split("/reports")[0].split("/metrics")[0] in folders
            )
        for dep in declared["deps"]:
            file = fill(dep, item).replace("${code}", str(ROOT))
            assert file.startswith("cells/") or Path(file).exists(), file


@pytest.mark.parametrize("stage", [name for name in STAGES if name.split("_")[0] in ROOT_STAGES])
def test_cells_depend_on_the_code_of_the_root_pipeline_and_their_own_method(stage: str) -> None:
    def code(declared: dict) -> set[str]:
        return {dep for dep in declared["deps"] if dep.startswith("${code}")}

    def of_methods(deps: set[str]) -> set[str]:
        return {dep for dep in deps if dep.split("/")[2] in METHODS}

    ours, theirs = code(STAGES[stage]), code(ROOT_STAGES[stage.split("_")[0]])
    assert ours - of_methods(ours) == theirs - of_methods(theirs)
    package = of_methods(theirs)
    assert len(package) <= 1
    for name in package:  # the helpers of the package are named, its methods are not
        files = (ROOT / name.removeprefix("${code}/")).glob("*.py")
        helpers = {
            f"{name}/{file.name}"
            for file in files
            if file.name != "__init__.py" and 'name: Literal["' not in file.read_text()
        }
        if stage.startswith("audit"):  # shows the published rule beside any other
            helpers.add(f"{name}/delta_influence.py")
        assert {dep for dep in of_methods(ours) if "${item" not in dep} == helpers


def test_a_cell_collects_its_sections_and_folders() -> None:
    params, paths = read_cell(PAPER / "params.yaml", "cifar10/3/smooth/ekfac/potion", "remediate")
    assert (params.seed, params.attack.name) == (3, "smooth")
    assert (params.detector.name, params.unlearner.name) == ("influence_threshold", "potion")
    assert paths.poisoned_train == Path("cells/cifar10/3/smooth/artifacts/poisoned_train")
    assert paths.clean_train == Path("cells/cifar10/3/artifacts/clean_train")
    assert paths.flags == Path("cells/cifar10/3/smooth/ekfac/artifacts/flags")
    assert paths.reports == Path("cells/cifar10/3/smooth/ekfac/potion/reports")
    assert paths.scratch("detect") == Path("cells/cifar10/3/smooth/ekfac/scratch/detect")


@pytest.mark.parametrize(
    ("cell", "stage", "changed", "same"),
    [
        ("cifar10/0/badnets", "train", "detectors", True),
        ("cifar10/0/badnets", "train", "directions", True),
        ("cifar10/0/badnets", "directions", "directions", False),
        ("cifar10/0/badnets/normalised", "detect", "directions", False),
        ("cifar10/0/badnets/normalised", "detect", "detectors", False),
        ("cifar10/0/badnets/ekfac", "detect", "directions", True),
        ("cifar10/0/badnets/truth", "reference", "detectors", True),
        ("cifar10/0/badnets/truth/eu", "remediate", "detectors", True),
        ("cifar10/0/badnets/truth/eu", "remediate", "directions", True),
        ("cifar10/0/badnets/truth/eu", "remediate", "unlearners", False),
    ],
)
def test_settings_are_those_a_cell_depends_on(
    cell: str, stage: str, changed: str, same: bool, tmp_path: Path
) -> None:
    matrix = yaml.safe_load((PAPER / "params.yaml").read_text())
    other = tmp_path / "params.yaml"
    if changed == "detectors":
        matrix[changed] = {name: {"name": "activation_clustering"} for name in matrix[changed]}
    elif changed == "unlearners":
        matrix[changed] = {name: {"name": "potion"} for name in matrix[changed]}
    else:
        matrix["shared"][changed] = {"batch_size": 7}
    other.write_text(yaml.safe_dump(matrix))
    before, after = (
        settings_of(*read_cell(path, cell, stage), stage) for path in (PAPER / "params.yaml", other)
    )
    assert (before == after) is same


@pytest.mark.parametrize("kind", REFERENCES)
def test_references_stand_for_detectors(kind: str) -> None:
    _, paths = read_cell(PAPER / "params.yaml", f"cifar10/0/badnets/{kind}/eu", "remediate")
    assert paths.detection.name == kind


@pytest.mark.parametrize(
    ("stage", "cell", "message"),
    [
        ("data", "cifar10", "expected <world>/<seed>, got 'cifar10'"),
        ("data", "cifar10/x", "expected <world>/<seed>"),
        ("data", "cifar10/00", "expected <world>/<seed>"),
        ("detect", "cifar10/0/badnets", "expected <world>/<seed>/<attack>/<detector>, got"),
        ("gate", "cifar10/0", "stage gate: expected no cell"),
        ("detect", "cifar10/0/badnets/truth", "cannot give the flags of 'truth'"),
        ("reference", "cifar10/0/badnets/ekfac", "cannot give the flags of 'ekfac'"),
        ("data", "mars/0", "'mars' is not one of worlds: cifar10, imagenette, cifar100"),
        ("train", "cifar10/0/zap", "'zap' is not one of attacks: badnets"),
        ("detect", "cifar10/0/badnets/zap", "'zap' is not one of detectors: normalised"),
        ("audit", "cifar10/0/badnets/ekfac/zap", "'zap' is not one of unlearners: eu"),
    ],
)
def test_refuses_cells_that_do_not_exist(stage: str, cell: str, message: str) -> None:
    with pytest.raises(DefenseError, match=message):
        read_cell(PAPER / "params.yaml", cell, stage)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda matrix: matrix.update(shared=None), "shared needs the keys"),
        (lambda matrix: matrix["worlds"]["cifar10"].update(scores={}), "cifar10 needs the keys"),
        (lambda matrix: matrix["worlds"].update(cifar10=None), "cifar10 needs the keys"),
        (lambda matrix: matrix.update(detectors={}), "named variants in 'detectors'"),
        (lambda matrix: matrix.update(detectors={"normalised": None}), "detector: "),
    ],
)
def test_refuses_a_matrix_with_sections_elsewhere(tmp_path: Path, change, message: str) -> None:
    matrix = yaml.safe_load((PAPER / "params.yaml").read_text())
    change(matrix)
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(matrix))
    with pytest.raises(DefenseError, match=message):
        read_cell(file, "cifar10/0/badnets", "train")
