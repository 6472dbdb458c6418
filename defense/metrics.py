"""What the audit measures: rates of a model, and a detector against the truth."""

import numpy as np
from numpy.typing import NDArray

from defense.records import Flags, ImageSet, Mask, Truth
from defense.report import DetectionQuality, ModelQuality, Rate


def rate(hits: Mask) -> Rate:
    """Build a rate from one boolean per trial."""
    return Rate.of(int(hits.sum()), len(hits))


def model_quality(
    clean: NDArray[np.int64],
    probe: NDArray[np.int64],
    test_set: ImageSet,
    probe_set: ImageSet,
    truth: Truth,
    affected_ids: NDArray[np.str_],
    fooled: Mask,
) -> ModelQuality:
    """Measure one model from its predictions.

    The affected inputs are left out of the poison success rate and of robust accuracy: they
    were chosen because they succeed. If the attack is aimed at nothing else, they are all there
    is, and count. Images that are attacked without a trigger do not count for clean accuracy.

    Args:
        clean: Predicted classes of the test set, int64 ``[t]``.
        probe: Predicted classes of the probe, int64 ``[p]``.
        test_set: The untriggered test set.
        probe_set: The triggered test images.
        truth: What was planted.
        affected_ids: Ids of the affected inputs.
        fooled: Whether they get the label they were reported with, bool ``[a]``.
    """
    chosen = np.isin(probe_set.ids, affected_ids)
    trials = np.ones_like(chosen) if chosen.all() else ~chosen
    originals = np.isin(test_set.ids, probe_set.ids[trials]) & ~truth.victims
    return ModelQuality(
        psr=rate((probe == truth.target_class)[trials]),
        clean_accuracy=rate((clean == test_set.labels)[~truth.victims]),
        robust_accuracy=rate((probe == truth.probe_labels)[trials]),
        affected_fooled=rate(fooled),
        without_trigger=rate((clean == truth.target_class)[originals]),
    )


def detection_quality(flags: Flags, truth: Truth) -> list[DetectionQuality]:
    """Measure a detector's rule on all rows and on the rows with the predicted label."""
    everything = np.ones_like(flags.predicted_label)
    rows = {"predicted_label": flags.predicted_label, "all": everything}
    return [_quality(name, mask, flags, truth) for name, mask in rows.items()]


def ranking(flags: Flags, rows: Mask) -> NDArray[np.int64]:
    """Ranks of the suspicion, with every row outside `rows` ranked last: ``[n]``."""
    ranks = 1 + np.unique(flags.suspicion, return_inverse=True)[1]
    return np.where(rows, ranks, 0)


def _quality(name: str, rows: Mask, flags: Flags, truth: Truth) -> DetectionQuality:
    from sklearn.metrics import average_precision_score  # slow to import, needed here alone

    flagged = rows & (flags.suspicion > flags.threshold)
    return DetectionQuality(
        rows=name,
        tpr=rate(flagged[truth.poisoned]),
        precision=rate(truth.poisoned[flagged]),
        average_precision=float(average_precision_score(truth.poisoned, ranking(flags, rows))),
    )
