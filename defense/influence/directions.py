"""Stored directions of rows that answer how rows and inputs cohere."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from defense.compute import batches
from defense.errors import ArtifactError, DataError, NumericalError
from defense.influence.sketch import Sketcher
from defense.influence.store import RowStore
from defense.records import Factors, Queries

SAMPLE = 64  # rows whose length is looked at
SHORTEST = 0.9  # length on average, at least


@dataclass(frozen=True)
class StoredDirections:
    """A row store that can be asked about rows and inputs of a model.

    Attributes:
        store: The rows.
        sketcher: Makes vectors of inputs, from `RowStore.sketcher`.
    """

    store: RowStore
    sketcher: Sketcher

    @classmethod
    def of(cls, store: RowStore, model: nn.Module, factors: Factors) -> "StoredDirections":
        """Prepare a store for questions about its rows and about inputs of its model.

        Args:
            store: Of whole directions.
            model: See `RowStore.sketcher`.
            factors: See `RowStore.sketcher`.

        Raises:
            ArtifactError: The store is of another model, or its vectors are not of length one.
            NumericalError: Some are not finite.
        """
        if store.components is not None:
            raise ArtifactError(
                "expected whole directions, got a store of their leading components: build it "
                "with components null"
            )
        wrong = np.flatnonzero(~np.isfinite(store.self_influence))
        if len(wrong):
            raise NumericalError(
                f"expected finite directions, got {len(wrong):,} of {len(store.rows):,} that are "
                f"not, the first of row {wrong[0]}: look at that row, at the model's weights and "
                "at the factors"
            )
        sample = store.rows[:: max(1, len(store.rows) // SAMPLE)].astype(np.float32)
        length = float(np.sqrt((sample**2).sum(1)).mean())
        if length < SHORTEST:
            raise ArtifactError(
                f"expected directions of length one, got {length:.2f} on average: most of them "
                "lies in coordinates that are not kept; set directions.leading"
            )
        return cls(store, store.sketcher(model, factors))

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
        return replace(self, store=store)

    def rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `defense.evidence.Directions.rows`."""
        return self.store.between(rows)

    def vectors(self, images: Tensor, labels: Tensor) -> NDArray[np.float32]:
        """See `defense.evidence.Directions.vectors`."""
        nothing = torch.zeros(len(labels), dtype=torch.int64)
        queries = Queries(images, labels, nothing, nothing)
        return torch.cat([*query_vectors(self.store, self.sketcher, queries)]).numpy()

    def towards(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `defense.evidence.Directions.towards`."""
        return self.store.cosine(torch.from_numpy(vectors))


def query_vectors(store: RowStore, sketcher: Sketcher, queries: Queries) -> Iterator[Tensor]:
    """Yield stored vectors of queries, a batch at a time: ``[b, k]``.

    Args:
        store: The store.
        sketcher: From `RowStore.sketcher`.
        queries: Images and labels whose measure is differentiated.

    Raises:
        ArtifactError: The sketcher was not made by this store.
        DataError: There are no queries.
    """
    if sketcher.origin != store.origin or not np.array_equal(sketcher.kept, store.kept):
        raise ArtifactError("expected a sketcher made by this store, got another: store.sketcher()")
    if not len(queries.labels):
        raise DataError("expected queries, got none")
    for rows in batches(len(queries.labels), store.settings.batch_size, label="queries"):
        sketches, _ = sketcher.sketches(queries.images[rows], queries.labels[rows])
        yield store.vectors(sketches)


def query_store(store: RowStore, sketcher: Sketcher, queries: Queries) -> NDArray[np.float32]:
    """Cosine of queries with every stored row, without touching the rows: ``[q, n]``.

    See `query_vectors` for arguments and errors.
    """
    return np.concatenate([*map(store.cosine, query_vectors(store, sketcher, queries))])
