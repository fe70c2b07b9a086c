"""Make the tables and figures of `memory.py` from its stored rows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from _bars import Bar, Result, bars, point
from _chunked_rows import IN_CHUNKS
from _fronts import Series, plot
from _measure import markdown
from _rows import ALL_ACTIVE, CHECKPOINTED, FULL, PEER_FRONT, RANDOM, REFERENCE, budget_name
from _shapes import LARGE, ON_CPU
from _stored import Row, described

MIB = 2**20
SLACK = {shape.name: shape.slack for shape in (*ON_CPU, *LARGE)}
IN_README = (
    *(REFERENCE, CHECKPOINTED, RANDOM, ALL_ACTIVE),
    *(budget_name(*budget) for budget in ((0.75, 1), (0.4, 1), (0.4, 0.6), (0.175, 1))),
)


def results(rows: Sequence[Row]) -> dict[str, Result]:
    """Return the rows that ran, as ratios to the reference row."""
    ran = {row["row"]: row for row in rows if "refused" not in row}
    unit = ran[REFERENCE]
    return {
        name: Result(
            peak=row["peak"] / unit["peak"],
            peak_mean=row["peak_mean"] / unit["peak"],
            saved=row["saved"] / unit["saved"],
            saved_mean=row["saved_mean"] / unit["saved"],
            forward=row["forward"] / unit["forward"],
            backward=row["backward"] / unit["backward"],
            flops=_flops(row) / _flops(unit),
            ops=row["ops"],
            added=row["adapter_ops"] / unit["adapter_ops"],
            time=_seconds(row) / _seconds(unit),
            draws=row["draws"],
            distinct=row["distinct"],
            tokens=row["tokens"] / _seconds(row),
            resident=row["resident"],
            idle=row["idle"],
            least_probability=row["least_probability"],
        )
        for name, row in ran.items()
    }


def _flops(row: Row) -> float:
    return float(row["forward"] + row["backward"])


def _seconds(row: Row) -> float:
    return math.nan if row["seconds"] is None else float(row["seconds"])


def unit_line(rows: Sequence[Row]) -> str:
    """Return a sentence with the values that the ratio 1 stands for."""
    unit = next(row for row in rows if row["row"] == REFERENCE)
    timed = "" if unit["seconds"] is None else f", and {unit['seconds']:.2f} s per step"
    return (
        f"1.000 is {unit['peak'] / MIB:.1f} MiB peak, {unit['saved'] / MIB:.1f} MiB saved, "
        f"{unit['forward'] / 1e9:.1f} GFLOPs forward and {unit['backward'] / 1e9:.1f} backward, "
        f"{unit['adapter_ops']:.0f} operations that\npeft's adapters add{timed}."
    )


def main_table(rows: Sequence[Row]) -> str:
    """Return the table of rows. Rows that a budget refused follow, with the reason."""
    on_card = rows[0]["run"]["hardware"]["card"] is not None
    header = ["row", "peak, largest", "mean", "saved, largest", "mean", "forward FLOPs"]
    header += ["backward FLOPs", "both", "ops", "added ops, ratio", "time", "tokens/s"]
    header += ["draws (distinct)", f"{'CUDA peak' if on_card else 'peak RSS'} (MiB)"]
    lines = [_cells(name, result) for name, result in results(rows).items()]
    refused = [f"{row['row']} is missing: {row['refused']}" for row in rows if "refused" in row]
    above = f"{described(rows, 'transformers', 'peft')}\n{unit_line(rows)}"
    return "\n\n".join([above, markdown(header, lines), *refused])


def _cells(name: str, r: Result) -> list[str]:
    ratios = [r.peak, r.peak_mean, r.saved, r.saved_mean, r.forward, r.backward, r.flops]
    line = [name, *(f"{ratio:.3f}" for ratio in ratios), f"{r.ops:.0f}", f"{r.added:.2f}"]
    times = ["-", "-"] if math.isnan(r.time) else [f"{r.time:.3f}", f"{r.tokens:.0f}"]
    line += [*times, f"{r.draws} ({r.distinct})"]
    return [*line, "-" if r.resident is None else f"{r.resident / MIB:.0f}"]


def found_bars(rows: Sequence[Row]) -> list[Bar]:
    return bars(results(rows), SLACK[rows[0]["part"]])


def bars_table(rows: Sequence[Row]) -> str:
    lines = [bar.line() for bar in found_bars(rows)]
    return markdown(["target", "value", "limit", ""], lines)


def readme_table(rows: Sequence[Row]) -> str:
    """Return the table with the rows of the README."""
    header = ["RoBERTa-base shape, 16 x 128 tokens; ratios to peft's LoRA"]
    header += ["largest peak", "mean backward FLOPs", "time"]
    found = results(rows)
    lines = [
        [_as_code(name), *(f"{ratio:.2f}" for ratio in (r.peak, r.backward, r.time))]
        for name, r in ((name, found[name]) for name in IN_README)
    ]
    return markdown(header, lines)


def _as_code(name: str) -> str:
    return re.sub(r"(Budget\(.*\))", r"`\1`", name)


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Plot the fronts."""
    found = results(rows)
    costs = {"backward": "mean backward FLOPs", "time": "median step time"}
    if any(
        name.endswith(IN_CHUNKS) for name in found
    ):  # the gradients of the loss are formed in the forward
        costs = {"flops": "mean FLOPs of forward and backward", "time": "median step time"}
    if math.isnan(found[REFERENCE].time):
        del costs["time"]
    title = f"{rows[0]['part']}: largest peak of a step against its cost"
    plot(path, title, {label: _series(found, cost) for cost, label in costs.items()})


def _series(found: Mapping[str, Result], cost: str) -> Series:
    lines = {f"peft LoRA, blocks checkpointed{end}": _peers(end) for end in ("", IN_CHUNKS)}
    for name in found:
        if budget := re.fullmatch(rf"ours, Budget\((.+), (.+)\)({IN_CHUNKS})?", name):
            legend = f"ours, Budget(memory, {budget[2]}){budget[3] or ''}"
            lines.setdefault(legend, {})[budget[1]] = name
    lines |= {name: {"": name} for name in (ALL_ACTIVE, f"{ALL_ACTIVE}{IN_CHUNKS}", RANDOM, FULL)}
    series = {
        legend: {label: point(found[n], cost) for label, n in names.items() if n in found}
        for legend, names in lines.items()
    }
    return {legend: points for legend, points in series.items() if points}


def _peers(end: str) -> dict[str, str]:
    """Return the rows of the peers' front whose names end so, each under its label in the plot."""
    return {
        name.removeprefix("peft, ").removesuffix(" checkpointed"): f"{name}{end}"
        for name in PEER_FRONT
    }
