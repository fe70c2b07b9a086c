"""Make the tables of `overhead.py` from its stored rows."""

from __future__ import annotations

from collections.abc import Sequence

from _measure import markdown
from _stored import Row, described

REFERENCE = "our LoRA, AdamW"
STEP = "MiniLM step"


def step_table(rows: Sequence[Row]) -> str:
    """Return the table of a real step."""
    unit = _unit(rows)["seconds"]
    header = ["row", "dispatched ops per step", "median time, ratio", "median ms"]
    lines = [
        [r["row"], f"{r['ops']:.0f}", f"{r['seconds'] / unit:.3f}", f"{r['seconds'] * 1e3:.1f}"]
        for r in rows
    ]
    return f"{described(rows, 'transformers', 'peft')}\n\n{markdown(header, lines)}"


def group_table(rows: Sequence[Row]) -> str:
    """Return a table: the time of a step, of its update, and what a reallocation adds to it."""
    unit = _unit(rows)["seconds"]
    header = ["row", "dispatched ops per step", "step, ratio", "step, ms", "update only, ms"]
    lines = []
    for row in rows:
        line = [row["row"], f"{row['ops']:.0f}", f"{row['seconds'] / unit:.2f}"]
        line += [f"{row['seconds'] * 1e3:.2f}", f"{row['update'] * 1e3:.2f}"]
        twin = row["reallocating_update"]
        lines.append([*line, "-" if twin is None else f"{(twin - row['update']) * 1e3:+.2f}"])
    return markdown([*header, "a reallocation adds, ms"], lines)


def _unit(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row["row"] == REFERENCE)
