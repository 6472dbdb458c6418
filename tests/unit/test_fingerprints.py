"""What is part of the fingerprint of a model, and what is not."""

import inspect
import logging
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defense.checkpoints import digest_of_model, fingerprint
from tests.conftest import make_images
from tests.unit.fits import fit, score, small_model


class Scaled(nn.Module):
    """Does not show its factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor


def test_attributes_and_buffers_are_part_of_a_fingerprint() -> None:
    images = make_images(4, seed=4)
    one, same, other = (nn.Sequential(Scaled(factor)) for factor in (0.1, 0.1, 0.2))
    assert fingerprint(one, images) == fingerprint(same, images)
    assert fingerprint(one, images) != fingerprint(other, images)
    same[0].register_buffer("hidden", torch.ones(2), persistent=False)
    assert fingerprint(one, images) != fingerprint(same, images)


class Acting(nn.Module):
    """Applies functions it holds."""

    def __init__(self, *functions) -> None:
        super().__init__()
        self.functions, self.sizes = list(functions), {"first": 1}


class Held:
    """No module."""

    def __init__(self, value: object) -> None:
        self.value = value


class Inheriting(Scaled):
    """Has no code of its own."""


def scaled_by(factor: float):
    return lambda x: factor * x


def hooked(factor: float) -> nn.Module:
    module = Acting(F.relu)
    module.register_forward_hook(lambda module, inputs, output: factor * output)
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda second: Acting(F.gelu if second else F.relu),
        lambda second: Acting(partial(F.gelu, approximate="tanh" if second else "none")),
        lambda second: Acting(partial(F.gelu if second else F.relu)),
        lambda second: Acting(scaled_by(2.0 if second else 1.0)),
        lambda second: Acting(Acting(F.gelu if second else F.relu).forward),
        lambda second: Acting(Held(2 if second else 1)),
        lambda second: Acting(Held(torch.ones(2) if second else torch.zeros(2))),
        lambda second: Scaled(torch.tensor(0.2 if second else 0.1)),
        lambda second: Scaled(torch.tensor(0.5, dtype=torch.bfloat16 if second else None)),
        lambda second: Scaled(np.full(2, 0.2 if second else 0.1)),
        lambda second: Scaled(torch.float32 if second else torch.float64),
        lambda second: hooked(2.0 if second else 1.0),
        lambda second: Scaled(SimpleNamespace(factor=2 if second else 1)),
        lambda second: Scaled({2 if second else 1}),
        lambda second: Scaled(np.float32(2 if second else 1)),
        lambda second: Scaled(slice(0, 2 if second else 1)),
        lambda second: Scaled(np.array(["a", "b" if second else "c"])),
    ],
)
def test_whatever_a_module_holds_is_part_of_it(make) -> None:
    assert digest_of_model(make(False)) == digest_of_model(make(False))
    assert digest_of_model(make(False)) != digest_of_model(make(True))


def test_objects_that_hold_each_other_are_told_once() -> None:
    held = [Held(number) for number in range(30)]
    for each in held:
        each.value = held
    assert digest_of_model(Scaled(held[0])) == digest_of_model(Scaled(held[0]))


def test_what_a_hook_collects_is_not_part_of_it() -> None:
    model, seen = small_model(), []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    factors = fit(model, make_images(48, seed=4), None)
    assert seen
    score(model, factors, make_images(48, seed=4), None)


def test_what_holds_itself_and_what_is_of_this_process_alone_is_told_shortly() -> None:
    one, same = Acting(logging.getLogger("one")), Acting(logging.getLogger("other"))
    one.functions.append(one.functions)
    same.functions.append(same.functions)
    assert digest_of_model(one) == digest_of_model(same)


def test_functions_containers_and_base_classes_are_part_of_it(monkeypatch) -> None:
    one, same = Acting(F.relu), Acting(F.relu)
    assert digest_of_model(one) == digest_of_model(same)
    same.sizes["first"] = 2
    assert digest_of_model(one) != digest_of_model(same)
    before = digest_of_model(Inheriting(0.1))
    read = inspect.getsource
    monkeypatch.setattr("inspect.getsource", lambda kind: read(kind) + "#" * (kind is Scaled))
    assert digest_of_model(Inheriting(0.1)) != before
