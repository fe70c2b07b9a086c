"""Make the tables of `quickstart_seeds.py` from its stored rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from _measure import markdown
from _stored import Row, described

MIB = 2**20
DEFAULTS = "--steps 150 --length 40 --lr 4e-3 --period 10"  # of examples/quickstart.py
OVER_SEEDS = ("--steps 300 --lr 4e-3 --period 20", "--steps 300 --lr 2e-3 --period 50")
COLUMNS = {"LoRA": "LoRA", "DynaLoRA": "DynaLoRA, 8 of 12 modules", "Budget": "Budget(0.4, 0.6)"}
LINES: dict[str, Callable[[Row], str]] = {
    "held-out accuracy before": lambda run: f"{run['accuracy_before']:.3f}",
    "held-out accuracy after": lambda run: f"{run['accuracy']:.3f}",
    "active trainable parameters (mean)": lambda run: f"{run['active_parameters']:,.0f}",
    "CPU seconds per step (median)": lambda run: f"{run['seconds_per_step']:.3f}",
    "peak memory of a step (MiB)": lambda run: f"{run['peak_bytes'] / MIB:.1f}",
}


def methods_table(rows: Sequence[Row]) -> str:
    """Return the table of the run with seed 0 and default settings, with one column per method."""
    runs = {row["row"]: row for row in rows if row["seed"] == 0}
    lines = [[label, *(cell(runs[name]) for name in COLUMNS)] for label, cell in LINES.items()]
    return markdown(["", *COLUMNS.values()], lines)


def described_methods_table(rows: Sequence[Row]) -> str:
    return f"{described(rows)}\n\n{methods_table(rows)}"


def seeds_table(parts: Sequence[Sequence[Row]]) -> str:
    """Return the table of held-out accuracies, LoRA / DynaLoRA, with one line per part."""
    seeds = sorted({row["seed"] for rows in parts for row in rows})
    lines = []
    for rows in parts:
        found: dict[Any, Row] = {(row["row"], row["seed"]): row for row in rows}
        pairs = [[found[name, seed]["accuracy"] for name in ("LoRA", "DynaLoRA")] for seed in seeds]
        cells = [" / ".join(f"{value:.3f}".lstrip("0") for value in pair) for pair in pairs]
        lines.append([f"`{rows[0]['part']}`", *cells])
    table = markdown(["settings", *(f"seed {seed}" for seed in seeds)], lines)
    return f"{described(parts[0])}\n\n{table}"
