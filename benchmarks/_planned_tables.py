"""Make the table of `planned_lora.py` from its stored rows."""

from __future__ import annotations

from collections.abc import Sequence

from _measure import markdown
from _stored import Row, described

GIB = 2**30
CATEGORIES = ("weights", "gradients", "optimizer_state", "activations", "peak")


def planned_lora_table(rows: Sequence[Row]) -> str:
    """Return the table of the estimates, in GiB. The peak is that of the whole process."""
    header = ["shape", "row", *(name.replace("_", " ") for name in CATEGORIES[:-1])]
    lines = [
        [row["shape"], row["row"], *(f"{row['memory'][name] / GIB:,.2f}" for name in CATEGORIES)]
        for row in rows
    ]
    table = markdown([*header, "whole process"], lines)
    return f"{described(rows, 'transformers', 'peft', 'bitsandbytes')}\nIn GiB:\n\n{table}"
