"""What the sweep imports from the examples, and the folder of the stored runs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from _assets import CAUSAL_LM, CLASSIFIER, archive, cache_folder, extract, locate, made, pins
from _common import (
    Batch,
    Row,
    batched,
    encode,
    head_modules,
    linear_schedule,
    positive,
    pretrained,
    read_csv,
    split_tenth,
    training_batches,
    without_padding,
)

STORED = Path(__file__).parents[1] / "results" / "quality"  # described in `../RESULTS.md`

__all__ = [
    "CAUSAL_LM",
    "CLASSIFIER",
    "STORED",
    "Batch",
    "Row",
    "archive",
    "batched",
    "cache_folder",
    "encode",
    "extract",
    "head_modules",
    "linear_schedule",
    "locate",
    "made",
    "pins",
    "positive",
    "pretrained",
    "read_csv",
    "split_tenth",
    "training_batches",
    "without_padding",
]
