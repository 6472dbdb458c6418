"""Stored directions of rows that answer how rows and inputs cohere."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from defense.influence.sketch import Sketcher
from defense.influence.store import RowStore, query_store
from defense.records import Queries


@dataclass(frozen=True)
class StoredDirections:
    """A row store that can be asked about rows and inputs of a model."""

    store: RowStore
    sketcher: Sketcher

    @property
    def self_influence(self) -> NDArray[np.float32]:
        """See `defense.evidence.Directions`."""
        return self.store.self_influence

    def take(self, rows: NDArray[np.int64]) -> "StoredDirections":
        """See `defense.evidence.Directions.take`."""
        store = replace(
            self.store,
            rows=self.store.rows[rows],
            self_influence=self.store.self_influence[rows],
        )
        return StoredDirections(store, self.sketcher)

    def rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `defense.evidence.Directions.rows`."""
        return self.store.between(rows)

    def inputs(self, images: Tensor, labels: Tensor) -> NDArray[np.float32]:
        """See `defense.evidence.Directions.inputs`."""
        nothing = torch.zeros(len(labels), dtype=torch.int64)
        return query_store(self.store, self.sketcher, Queries(images, labels, nothing, nothing))
