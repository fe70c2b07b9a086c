"""Make the tables of whole blocks on a budget, and of equal compute, from the stored runs."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from _measure import markdown
from _quality_tables import BLOCK_PAIRS, FOLDER, mean_and_less, stored
from _stored import Row, read

sys.path.insert(0, str(Path(__file__).resolve().parent / "quality"))
from _compare import Sweep
from report import pairs_table, qualities, rates

COSTS = FOLDER / "costs.jsonl"


def blocks() -> str:
    """Return the table of full parameters by blocks, with the whole memory of training."""
    sweep = stored("blocks")
    head = ["method", *sweep.tasks, "mean", "active parameters", "peak", "with active state"]
    return markdown(
        [*head, "with all state", "minus lora"], [_block_row(sweep, name) for name in sweep.methods]
    )


def _block_row(sweep: Sweep, name: str) -> list[str]:
    cells = [sweep.cells[name, task] for task in sweep.tasks]
    active = statistics.fmean(cell.average("active_parameters") for cell in cells)
    sizes = [
        sweep.ratio(name, "lora", size, sweep.tasks)
        for size in ("peak_bytes", "whole_active", "whole")
    ]
    mean, less = mean_and_less(sweep, name)
    measured = [f"{active:,.0f}", *(f"{size:.2f}" for size in sizes)]
    return [name, *qualities(sweep, name), mean, *measured, less]


def blocks_rates() -> str:
    return rates(stored("blocks"))


def blocks_pairs() -> str:
    return pairs_table(stored("blocks"), BLOCK_PAIRS)


def costs() -> str:
    """Return the table of what a step costs, as means over the tasks of ratios to LoRA."""
    lines = [[name, f"{flops:.3f}", f"{time:.3f}"] for name, (flops, time) in _costs().items()]
    return markdown(["method", "FLOPs of a step", "CPU time of a step"], lines)


def _costs() -> dict[str, tuple[float, float]]:
    """Return, for each method, FLOPs and time of a step as means over tasks of ratios to LoRA."""
    rows = read(COSTS)
    base = {row["part"]: row for row in rows if row["row"] == "lora"}
    return {
        name: (_ratio(rows, base, name, "flops"), _ratio(rows, base, name, "seconds"))
        for name in dict.fromkeys(row["row"] for row in rows)
    }


def _ratio(rows: Sequence[Row], base: Mapping[str, Row], name: str, what: str) -> float:
    mine = [row for row in rows if row["row"] == name]
    return statistics.fmean(row[what] / base[row["part"]][what] for row in mine)


def equal() -> str:
    """Return the table of runs that end at the compute of LoRA's run."""
    sweep, cost = stored("equal"), _costs()
    lines = []
    for name in sweep.methods:
        plain, _, longer = name.partition("@longer=")
        times = float(longer or 1)
        shares = [f"{times * share:.2f}" for share in (1, *cost[plain])]
        lines.append([plain, *shares, *qualities(sweep, name), *mean_and_less(sweep, name)])
    head = ["method", "steps", "FLOPs", "CPU time", *sweep.tasks, "mean", "minus lora"]
    return markdown(head, lines)


def equal_rates() -> str:
    return rates(stored("equal"))
