"""Telling the user of modules that never get a score."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from dynalora_optim.importance._windows import Window

logger = logging.getLogger(__name__)


def warn_of_evaluation(windows: Mapping[str, Window]) -> bool:
    """Tell of modules without a score that are left in evaluation mode; return whether some are."""
    left = [name for name, window in windows.items() if window.is_empty and window.skipped]
    if left:
        logger.warning(
            "%d of %d module groups have no score, such as %s: their forward passes with gradients "
            "were in evaluation mode, which does not count. Call model.train() (a model from "
            "from_pretrained() is in evaluation mode).",
            len(left),
            len(windows),
            left[0],
        )
    return bool(left)
