"""Scores on the host: replacing unusable ones, and normalising them (equation 2)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)


def normalised(scores: Sequence[float]) -> tuple[float, ...]:
    """Divide finite scores >= 0 by their sum (equation 2); uniform if all are 0."""
    largest = max(scores)
    if largest == 0:
        return (1 / len(scores),) * len(scores)
    scaled = [score / largest for score in scores]  # the sum of huge scores would be inf
    total = math.fsum(scaled)
    return tuple(score / total for score in scaled)


def usable_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """Replace scores that are not finite, or negative, by 0, and log their names."""
    bad = [name for name, score in scores.items() if not (math.isfinite(score) and score >= 0)]
    if bad:
        logger.warning(
            "Importance scores that are not finite and non-negative count as 0: %s",
            ", ".join(f"{name} = {scores[name]}" for name in bad),
        )
    return {name: 0.0 if name in bad else score for name, score in scores.items()}
