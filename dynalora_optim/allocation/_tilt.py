"""Lowering the mean cost of a distribution, with the smallest change that is enough."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dynalora_optim.importance._normalise import normalised

_LEAST = 1e-12  # tilting cannot raise a weight of 0, though it may be the only cheap one


def tilt(weights: Sequence[float], costs: Sequence[float], target: float) -> tuple[float, ...]:
    """Return probabilities p ~ w exp(-t c), with the least t >= 0 such that sum(p c) <= target.

    Of all distributions of that mean cost, this is the closest to ``weights`` (in relative
    entropy). If no t is large enough, all probability goes to the cheapest.
    """

    def tilted(t: float) -> tuple[float, ...]:
        logs = [math.log(max(w, _LEAST)) - t * c for w, c in zip(weights, costs, strict=True)]
        top = max(logs)
        return normalised([math.exp(log - top) for log in logs])

    def mean(t: float) -> float:
        return sum(p * c for p, c in zip(tilted(t), costs, strict=True))

    if mean(0.0) <= target:
        return tilted(0.0)
    low, high = 0.0, 1e4 / max(costs)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if mean(middle) <= target else (middle, high)
    return tilted(high)
