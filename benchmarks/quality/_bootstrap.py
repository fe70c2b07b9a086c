"""A paired bootstrap over test rows and seeds.

A draw of n rows with replacement is a vector of counts. Accuracy, F1, Matthews' correlation and
Pearson's correlation of the drawn rows are functions of sums that are weighted by these counts. So
one matrix product computes all draws of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from _suite import METRICS

DRAWS = 1000

Runs = Sequence[dict[str, Any]]
Drawn = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # counts, labels, predictions


def bootstrap(
    truth: np.ndarray, mine: Runs, theirs: Runs, generator: np.random.Generator
) -> np.ndarray:
    """Return the difference of the metric for each draw of seeds and rows, (DRAWS,).

    Args:
        truth: The labels of the test rows, (rows,).
        mine: One run per seed.
        theirs: The runs of the other method, with the same seeds in the same order.
        generator: Draws the seeds, and the rows, which are the same for both methods and all seeds.
    """
    metric = next(iter(mine[0]["test"]))
    counts = drawn_rows(len(truth), generator)
    differences = np.array(
        [
            resampled(metric, counts, truth, np.array(a["predictions"]))
            - resampled(metric, counts, truth, np.array(b["predictions"]))
            for a, b in zip(mine, theirs, strict=True)
        ]
    )
    seeds = generator.integers(len(mine), size=(len(mine), len(counts)))
    return np.asarray(np.take_along_axis(differences, seeds, axis=0).mean(0))


def drawn_rows(rows: int, generator: np.random.Generator) -> np.ndarray:
    """Return how often each row is drawn, (DRAWS, rows)."""
    counts = np.empty((DRAWS, rows))
    for draw in counts:
        draw[:] = np.bincount(generator.integers(rows, size=rows), minlength=rows)
    return counts


def resampled(
    metric: str, counts: np.ndarray, truth: np.ndarray, predictions: np.ndarray
) -> np.ndarray:
    """Return a metric of `METRICS` for the rows of each draw, (DRAWS,)."""
    binary = bool(np.isin(truth, (0, 1)).all() and np.isin(predictions, (0, 1)).all())
    fast = {**BY_SUMS, **(BY_TABLE if binary else {})}.get(metric)
    if fast is not None:
        return fast(counts, truth, predictions)
    places = (np.repeat(np.arange(len(truth)), draw.astype(int)) for draw in counts)
    return np.array([METRICS[metric](truth[rows], predictions[rows]) for rows in places])


def _accuracy(counts: np.ndarray, truth: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    return np.asarray(counts @ (truth == predictions).astype(float) / len(truth))


def _minus_loss(counts: np.ndarray, _: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    return np.asarray(-counts @ predictions / len(predictions))


def _pearson(counts: np.ndarray, truth: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return 0 if one of them is constant. Values are centred, so that the sums do not cancel."""
    x, y = (
        values - values.mean() if np.ptp(values) else 0 * values
        for values in _pair(truth, predictions)
    )
    sums = counts @ np.stack([x, y, x * x, y * y, x * y], axis=1) / len(truth)
    mean_x, mean_y, xx, yy, xy = sums.T
    square = (xx - mean_x**2) * (yy - mean_y**2)
    return _ratio(xy - mean_x * mean_y, np.sqrt(np.maximum(square, 0)))


def _pair(truth: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return truth.astype(float), predictions.astype(float)


def _f1(counts: np.ndarray, truth: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    hits, false, missed, _ = _table(counts, truth, predictions)
    return _ratio(2 * hits, 2 * hits + false + missed)


def _matthews(counts: np.ndarray, truth: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    hits, false, missed, rest = _table(counts, truth, predictions)
    square = (hits + false) * (hits + missed) * (rest + false) * (rest + missed)
    return _ratio(hits * rest - false * missed, np.sqrt(square))


def _table(counts: np.ndarray, truth: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return true positives, false positives, false negatives and true negatives, (4, DRAWS)."""
    y, p = _pair(truth, predictions)
    return np.asarray(
        (counts @ np.stack([y * p, (1 - y) * p, y * (1 - p), (1 - y) * (1 - p)], 1)).T
    )


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """Return over / under, and 0 if ``under`` is 0, as scikit-learn does."""
    return np.asarray(np.divide(over, under, out=np.zeros_like(over), where=under > 0))


BY_SUMS: dict[str, Drawn] = {
    "accuracy": _accuracy,
    "minus loss": _minus_loss,
    "Pearson": _pearson,
}
BY_TABLE: dict[str, Drawn] = {"F1": _f1, "Matthews correlation": _matthews}
