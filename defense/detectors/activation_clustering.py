"""Activation Clustering: every class is split in two (Chen et al. 2018; method card 3.1)."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, FastICA
from sklearn.metrics import silhouette_score

from defense.detectors.candidates import RowDetector
from defense.prediction import features
from defense.records import Case, Flags

SMALL = 0.35  # largest share of a class that a poisoned cluster may have
SEPARATE = 0.1  # smallest silhouette of a class that is poisoned
SILHOUETTE_ROWS = 1000  # of each cluster, at most

Array = NDArray[np.float32]


class ActivationClustering(RowDetector):
    """Split the activations of every class by 2-means and flag the smaller cluster.

    A row's suspicion is where it lies between the centres of the larger cluster (-1) and of
    the smaller one (+1).

    Attributes:
        reducer: What reduces the activations: ``pca``, or ``ica`` as in BackdoorBench.
        components: Dimensions that are left; 3 in the Delta-Influence paper, 10 in ART.
        rule: When a class's smaller cluster is flagged. ``smaller``: always, as in the
            Delta-Influence paper; ``relative_size``: if it holds less than 35 % of the class;
            ``silhouette``: if besides the silhouette of the split is above 0.1;
            ``distance``: if its median lies nearer to another class than to its own.
    """

    name: Literal["activation_clustering"] = "activation_clustering"
    reducer: Literal["pca", "ica"] = "pca"
    components: int = Field(3, gt=0)
    rule: Literal["smaller", "relative_size", "silhouette", "distance"] = "smaller"

    def detect(self, case: Case, generator: torch.Generator, scratch: Path | None = None) -> Flags:
        """See `Detector.detect`."""
        train = case.train
        seen: Array = features(case.model, train).numpy()
        seed = int(torch.randint(2**31, (), generator=generator))
        suspicion = np.zeros(len(train), dtype=np.float32)
        centres = {label: np.median(seen[train.labels == label], 0) for label in set(train.labels)}
        by_id = np.argsort(train.ids)  # so that the answer does not depend on the rows' order
        for label in sorted(centres):
            rows = by_id[train.labels[by_id] == label]
            if len(rows) > 2 and np.ptp(seen[rows], axis=0).any():  # there is something to split
                others = [centre for other, centre in centres.items() if other != label]
                suspicion[rows] = self._class_suspicion(seen[rows], centres[label], others, seed)
        return self.flags(case, suspicion, 0.0)

    def _class_suspicion(self, seen: Array, centre: Array, others: list[Array], seed: int) -> Array:
        """Split one class ``[m, d]``; at most 0 everywhere if the rule accepts it as clean."""
        reduced = self._reduce(seen, seed)
        split = KMeans(2, n_init=10, random_state=seed).fit(reduced)
        small = int(np.bincount(split.labels_, minlength=2).argmin())
        near, far = split.cluster_centers_[[small, 1 - small]]
        apart = np.square(far - near).sum()
        gain = np.square(reduced - far).sum(1) - np.square(reduced - near).sum(1)
        suspicion: Array = gain / max(apart, np.finfo(np.float32).tiny)
        members = split.labels_ == small
        if self._is_poisoned(seen, reduced, members, centre, others, seed):
            return np.where(members, np.maximum(suspicion, 1e-6), np.minimum(suspicion, 0))
        return np.minimum(suspicion, 0)

    def _reduce(self, seen: Array, seed: int) -> Array:
        count = min(self.components, *seen.shape)
        reducer = PCA(count, random_state=seed)
        if self.reducer == "ica":
            reducer = FastICA(count, random_state=seed, max_iter=1000, tol=1e-3)
        reduced: Array = reducer.fit_transform(seen)
        return reduced

    def _is_poisoned(
        self,
        seen: Array,
        reduced: Array,
        members: NDArray[np.bool_],
        centre: Array,
        others: list[Array],
        seed: int,
    ) -> bool:
        """Apply the rule to the smaller cluster of one class."""
        if not members.any() or self.rule == "smaller":
            return bool(members.any())
        if self.rule == "distance":
            median = np.median(seen[members], 0)
            own = np.linalg.norm(median - centre)
            return any(np.linalg.norm(median - other) < own for other in others)
        if members.mean() >= SMALL or self.rule == "relative_size":
            return bool(members.mean() < SMALL)
        mixed = np.random.default_rng(seed).permutation(len(reduced))
        rows = np.concatenate(
            [mixed[members[mixed] == side][:SILHOUETTE_ROWS] for side in (False, True)]
        )
        return bool(silhouette_score(reduced[rows], members[rows]) > SEPARATE)
