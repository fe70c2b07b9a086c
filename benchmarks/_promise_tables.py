"""Make the tables of `measuring.py` and of the soak of random cases from their stored rows."""

from __future__ import annotations

from collections.abc import Sequence

from _measure import markdown
from _stored import Row, described

EARLY = 100  # steps in which most shapes are new


def measuring_lines(rows: Sequence[Row]) -> str:
    """Return a table of how often a budget measures, and of the share of the time it takes."""
    head = [
        *("method", "steps", "different lengths", "measured", f"after {EARLY} steps"),
        *("first, in steps", "the others, share of the time"),
    ]
    return markdown(head, [_line(row) for row in rows])


def _line(row: Row) -> list[str]:
    step = (row["seconds"] - row["first_seconds"] - row["other_seconds"]) / row["steps"]
    counts = [str(row[key]) for key in ("steps", "lengths", "measured", "measured_late")]
    others = row["other_seconds"] / row["seconds"]
    return [row["row"], *counts, f"{row['first_seconds'] / step:.1f}", f"{others:.2%}"]


def measuring_table(rows: Sequence[Row]) -> str:
    """Return the table of `measuring_lines`, with where it was measured."""
    return f"{described(rows, 'transformers')}\n\n{measuring_lines(rows)}"


def soak_table(rows: Sequence[Row]) -> str:
    """Return the table of the soak: how many random cases held, and how many failed."""
    head = ["seed", "random cases", "held", "refused, as no plan fits", "failed"]
    names = ("seed", "cases", "held", "refused")
    lines = [[*(f"{row[name]:,}" for name in names), str(len(row["failed"]))] for row in rows]
    return f"{described(rows, 'transformers', 'peft')}\n\n{markdown(head, lines)}"
