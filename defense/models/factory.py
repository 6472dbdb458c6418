"""Any user network: a callable named ``package.module:callable``."""

import importlib
from typing import Any, Literal

from pydantic import Field
from torch import nn

from defense.contracts import Architecture
from defense.errors import DefenseError


class Factory(Architecture):
    """A network made by the user's own code.

    Attributes:
        factory: ``package.module:callable``; called with ``num_classes`` and `options` as
            keyword arguments, it returns a module from normalised images to logits. Its code
            is executed.
        options: Further keyword arguments.
    """

    name: Literal["factory"] = "factory"
    factory: str
    options: dict[str, Any] = Field(default_factory=dict)

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """See `Architecture.build`."""
        module_name, _, attribute = self.factory.partition(":")
        try:
            make = getattr(importlib.import_module(module_name), attribute)
            network = make(num_classes=num_classes, **self.options)
        except Exception as error:  # a user's code may raise anything
            raise DefenseError(
                f"model.factory: expected 'package.module:callable' that takes num_classes and "
                f"{sorted(self.options)}, got '{self.factory}' ({error})"
            ) from error
        if not isinstance(network, nn.Module):
            raise DefenseError(
                f"model.factory: '{self.factory}' returned {type(network)}, "
                "expected a torch.nn.Module"
            )
        return network
