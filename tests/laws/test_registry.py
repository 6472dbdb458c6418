"""Laws that hold for every method in every union."""

import inspect
from typing import Any

import pytest
from pydantic import ValidationError

from defense.attacks import AnyAttack
from defense.datasets import AnyDataSource
from defense.detectors import AnyDetector
from defense.method import Method, members
from defense.models import AnyArchitecture
from defense.unlearning import AnyUnlearner
from pipelines.params import Params

UNIONS = (AnyDataSource, AnyAttack, AnyArchitecture, AnyDetector, AnyUnlearner)
METHODS = [method for union in UNIONS for method in members(union)]
NEEDED: dict[str, dict[str, Any]] = {
    "folder": {"path": "x", "image_size": 8},
    "badnets": {"target_class": "a"},
    "blended": {"target_class": "a"},
    "smooth": {"target_class": "a"},
    "sig": {"target_class": "a"},
    "witches_brew": {"target_class": "a"},
    "factory": {"factory": "torch.nn:Linear"},
}


def make(method: type[Method]) -> Method:
    name = method.model_fields["name"].default
    return method(**NEEDED.get(name, {}))


@pytest.fixture(params=METHODS, ids=lambda method: method.__name__)
def method(request) -> type[Method]:
    return request.param


def test_unions_hold_methods() -> None:
    names = {method.model_fields["name"].default for method in METHODS}
    assert len(names) == len(METHODS)
    assert all(len(members(union)) >= 2 for union in UNIONS)


def test_is_frozen(method: type[Method]) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make(method).name = "other"


def test_refuses_unknown_hyperparameters(method: type[Method]) -> None:
    name = method.model_fields["name"].default
    with pytest.raises(ValidationError, match="no_such_setting"):
        method(**NEEDED.get(name, {}), no_such_setting=1)


def test_survives_json(method: type[Method]) -> None:
    first = make(method)
    assert method.model_validate_json(first.model_dump_json()) == first


def test_is_documented_with_every_hyperparameter(method: type[Method]) -> None:
    own = inspect.getdoc(method) or ""
    inherited = " ".join(inspect.getdoc(base) or "" for base in method.__mro__)
    assert own != (inspect.getdoc(Method) or "")
    for field in method.model_fields:
        assert field == "name" or f"{field}:" in inherited, f"{method.__name__}.{field}"


def test_every_union_is_a_section_of_params() -> None:
    annotations = [field.annotation for field in Params.model_fields.values()]
    sections = {cls for annotation in annotations for cls in members(annotation)}
    assert set(METHODS) <= sections
