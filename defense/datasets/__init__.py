"""Data sources: where images come from."""

from typing import Annotated

from pydantic import Field

from defense.datasets.digits import Digits
from defense.datasets.folder import Folder
from defense.datasets.hub import Cifar10, Cifar100, FashionMnist, Imagenette

AnyDataSource = Annotated[
    Digits | Cifar10 | Cifar100 | FashionMnist | Imagenette | Folder,
    Field(discriminator="name"),
]

__all__ = ["AnyDataSource"]
