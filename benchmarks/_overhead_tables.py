"""From the stored rows of `overhead.py` to its tables."""

from __future__ import annotations

from collections.abc import Sequence

from _measure import markdown
from _stored import Row, described

REFERENCE = "our LoRA, AdamW"
STEP = "MiniLM step"


def step_table(rows: Sequence[Row]) -> str:
    """Lay out the rows of a real step."""
    unit = _unit(rows)["seconds"]
    header = ["row", "dispatched ops a step", "median time, ratio", "median ms"]
    lines = [
        [r["row"], f"{r['ops']:.0f}", f"{r['seconds'] / unit:.3f}", f"{r['seconds'] * 1e3:.1f}"]
        for r in rows
    ]
    return f"{described(rows, 'transformers', 'peft')}\n\n{markdown(header, lines)}"


def group_table(rows: Sequence[Row]) -> str:
    """A row: a whole step, the update in it, and what a reallocation adds to that."""
    unit = _unit(rows)["seconds"]
    header = ["row", "dispatched ops a step", "step, ratio", "step, ms", "of it update, ms"]
    lines = []
    for row in rows:
        line = [row["row"], f"{row['ops']:.0f}", f"{row['seconds'] / unit:.2f}"]
        line += [f"{row['seconds'] * 1e3:.2f}", f"{row['update'] * 1e3:.2f}"]
        twin = row["reallocating_update"]
        lines.append([*line, "-" if twin is None else f"{(twin - row['update']) * 1e3:+.2f}"])
    return markdown([*header, "a reallocation adds, ms"], lines)


def _unit(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row["row"] == REFERENCE)
