"""Make the table of `recompute.py` from its stored rows."""

from __future__ import annotations

from collections.abc import Sequence

from _fronts import between
from _measure import markdown
from _stored import Row, described


def recompute_table(rows: Sequence[Row]) -> str:
    """Return the table of all shapes: peak and FLOPs as ratios to the shape's first row.

    The last column are the FLOPs of peft's front at the peak of the row, on a straight line between
    its neighbours, as if two settings were mixed; where peft does not reach that peak, a dash.
    """
    lines = []
    for shape in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == shape]
        points = {row["row"]: _point(row, mine[0]) for row in mine}
        front = [point for name, point in points.items() if name.startswith("peft")]
        for row in mine:
            peak, flops = points[row["row"]]
            theirs = between(front, peak)
            ratio = f"{flops / theirs:.3f}" if theirs < float("inf") else "-"
            lines.append(
                [shape, row["row"], str(row["inactive"]), f"{peak:.3f}", f"{flops:.3f}", ratio]
            )
    head = ["shape", "row", "inactive modules", "peak", "FLOPs", "of peft's at this peak"]
    return f"{described(rows, 'transformers', 'peft')}\n\n{markdown(head, lines)}"


def _point(row: Row, unit: Row) -> tuple[float, float]:
    return row["peak"] / unit["peak"], row["flops"] / unit["flops"]
