"""Methods: frozen hyperparameters with one verb. The typed unions of methods are the registry."""

import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict


class Method(BaseModel):
    """Base of every method: immutable, and a misspelt hyperparameter is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def members(union: Any) -> tuple[type[Method], ...]:
    """List the classes of a union such as ``AnyDetector``, or of a single class.

    Args:
        union: A class, a union of classes, or either wrapped in ``Annotated``.

    Returns:
        The classes in the order of the union.
    """
    if get_origin(union) is Annotated:
        return members(get_args(union)[0])
    if get_origin(union) in (Union, types.UnionType):
        return tuple(cls for arm in get_args(union) for cls in members(arm))
    return (union,)
