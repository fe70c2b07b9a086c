"""Make the tables of whole blocks on a budget, and of equal compute, from the stored runs."""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from _measure import markdown
from _quality_tables import (
    ALL_LINEAR,
    BLOCK_PAIRS,
    DRAWN,
    FOLDER,
    IN_MEMORY,
    RECOMPUTED,
    language_runs,
    mean_and_less,
    stored,
)
from _stored import Row, described, read

sys.path.insert(0, str(Path(__file__).resolve().parent / "quality"))
from _compare import Cell, Sweep, paired
from report import pairs_table, qualities, rates

COSTS, LANGUAGE_COSTS = FOLDER / "costs.jsonl", FOLDER / "language" / "costs.jsonl"
IN_LORAS_MEMORY = {  # the methods on the tasks, and on the language model
    "LoRA": ("lora", "lora"),
    "LoRA on all linear layers": (ALL_LINEAR, ALL_LINEAR),
    'that, on `Budget(0.4, base="topk")`': (RECOMPUTED, RECOMPUTED),
    "that, on `Budget(0.4, 0.6)`": (DRAWN, DRAWN),
    "the top blocks, always": ("top-blocks", "top-blocks@top=2/15"),
    "`blocks_on_budget`": ("blocks-0.30", IN_MEMORY),
    "all parameters": ("full", "full"),
}


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
    return _costs_table(COSTS)


def language_costs(task: str = "reuters_few") -> str:
    """Return the table of what a step of a language model costs on a task, as ratios to LoRA."""
    return _costs_table(LANGUAGE_COSTS, task)


def _costs_table(path: Path, part: str | None = None) -> str:
    found = _costs(path, part).items()
    lines = [[name, f"{flops:.3f}", f"{time:.3f}"] for name, (flops, time) in found]
    return markdown(["method", "FLOPs of a step", "CPU time of a step"], lines)


def _costs(path: Path, part: str | None = None) -> dict[str, tuple[float, float]]:
    """Return, for each method, FLOPs and time of a step as means over tasks of ratios to LoRA."""
    rows = read(path, part)
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
    sweep, cost = stored("equal"), _costs(COSTS)
    lines = []
    for name in sweep.methods:
        plain, _, longer = name.partition("@longer=")
        times = float(longer or 1)
        shares = [f"{times * share:.2f}" for share in (1, *cost[plain])]
        when = _reached(sweep, name)
        reached = [f"{when * times * share:.2f}" if when else "-" for share in cost[plain]]
        quality = [*qualities(sweep, name), *mean_and_less(sweep, name)]
        lines.append([plain, *shares, *quality, *reached])
    head = ["method", "steps", "FLOPs", "CPU time", *sweep.tasks, "mean", "minus lora"]
    return markdown([*head, "LoRA's quality after FLOPs", "after CPU time"], lines)


def _reached(sweep: Sweep, name: str) -> float | None:
    """Return after which share of its run a method has LoRA's final quality; None if never.

    Quality is the metric on validation data, as a mean over tasks and seeds; between two
    evaluations it is taken as linear.
    """
    wanted, curve = _curve(sweep, "lora")[-1][1], [(0.0, 0.0), *_curve(sweep, name)]
    for (start, before), (end, after) in pairwise(curve):
        if after >= wanted:
            return start + (end - start) * (wanted - before) / (after - before)
    return None


def _curve(sweep: Sweep, name: str) -> list[tuple[float, float]]:
    """Return the metric at each evaluation, with the share of the run before it."""
    cells = [sweep.cells[name, task] for task in sweep.tasks]
    first = cells[0].runs[0]
    shares = [found["step"] / first["evaluations"][-1]["step"] for found in first["evaluations"]]
    return [
        (share, statistics.fmean(r["evaluations"][n][c.metric] for c in cells for r in c.runs))
        for n, share in enumerate(shares)
    ]


def equal_rates() -> str:
    return rates(stored("equal"))


def language(part: str = "language") -> str:
    """Return the table of the runs of a language model, one line for each method and rate."""
    sweep = stored(part)
    lines = [line for name in sweep.methods for line in _language_lines(sweep, name)]
    head = ["method", "learning rate", "seeds", "validation loss", "held-out loss", "minus lora"]
    return markdown([*head, "active parameters", "peak", "with active state"], lines)


def _language_lines(sweep: Sweep, name: str) -> list[list[str]]:
    """Return a line for each rate of a method; at its best rate with the difference to LoRA."""
    (task,) = sweep.tasks
    best, lora = (sweep.cells[method, task] for method in (name, "lora"))
    rates = defaultdict(list)
    for run in language_runs(task):
        if run["settings"]["method"] == name:
            rates[run["settings"]["lr"]].append(run)
    lines = []
    for rate, runs in sorted(rates.items()):
        cell, is_best = Cell(tuple(runs)), rate == best.lr
        spread = f" ± {cell.deviation:.3f}" if len(runs) > 1 else ""
        less = _percent_less(sweep, name) if is_best and name != "lora" else "-"
        sizes = (cell.largest(size) / lora.largest(size) for size in ("peak_bytes", "whole_active"))
        active = cell.average("active_parameters") / lora.average("active_parameters")
        lines.append(
            [
                *(name + " (best)" * is_best, f"{rate:g}", str(len(runs))),
                *(f"{cell.average('validation_loss'):.3f}", f"{-cell.mean:.3f}{spread}", less),
                *(f"{number:.2f}" for number in (active, *sizes)),
            ]
        )
    return lines


def _percent_less(sweep: Sweep, name: str) -> str:
    """Return by how many percent the loss of a method is above LoRA's, on the seeds of both."""
    (task,) = sweep.tasks
    _, theirs = paired(sweep.cells[name, task], sweep.cells["lora", task])
    found, loss = sweep.difference(name, "lora"), Cell(theirs).mean  # each with a minus
    percent = [100 * x / loss for x in (found.value, found.high, found.low)]
    return "{:+.1f}% [{:+.1f}, {:+.1f}]".format(*percent)


def blocks_readme() -> str:
    """Return the table of the README: larger adapters and whole blocks in LoRA's memory."""
    tasks, language = stored("blocks"), stored("language_2000")
    (text,) = language.tasks
    lines, cost = [], _costs(LANGUAGE_COSTS, text)
    for label, (on_tasks, on_text) in IN_LORAS_MEMORY.items():
        memory = tasks.ratio(on_tasks, "lora", "whole_active", tasks.tasks)
        cells = [*mean_and_less(tasks, on_tasks, ""), f"{memory:.2f}"]
        loss = -language.cells[on_text, text].mean
        percent = "" if on_text == "lora" else _percent_less(language, on_text)
        size = language.ratio(on_text, "lora", "whole_active", [text])
        time = cost[on_text][1]
        lines.append([label, *cells, f"{loss:.2f}", percent, f"{size:.2f}", f"{time:.2f}"])
    head = ["trained", "3 tasks x 100", "minus LoRA", "memory"]
    return markdown([*head, "held-out loss", "minus LoRA", "memory", "time"], lines)


def soak(rows: Sequence[Row]) -> str:
    """Return the table of the random cases of `tests/soak.py`."""
    head = ["cases", "held", "refused", "failed"]
    lines = [
        [
            *(row["row"], *(f"{row[key]:,}" for key in head[:3]), str(len(row["failed"]))),
            *(str(row["again"]), f"{row['measured_beyond']:,}", f"{row['measured_most']:.2f}"),
        ]
        for row in rows
    ]
    head += ["held at the second try", "measuring took more", "the most, of the budget"]
    return f"{described(rows, 'transformers', 'peft')}\n\n{markdown(['', *head], lines)}"


def measuring(rows: Sequence[Row]) -> str:
    """Return the table of `benchmarks/quality/measuring.py`, whose rows need not be stored."""
    head = [
        *("method", "steps", "different lengths", "measured", "of these after 100 steps"),
        *("the first: FLOPs, in steps of LoRA", "its time, in these", "the others, of all time"),
    ]
    lines = [
        [
            *(row["row"], *(str(row[key]) for key in ("steps", "lengths", "measured"))),
            str(row["measured_late"]),
            *(f"{row['first_flops']:.2f}", f"{row['first_time']:.2f}"),
            f"{row['other_seconds'] / row['seconds']:.1%}",
        ]
        for row in rows
    ]
    return f"{described(rows, 'transformers')}\n\n{markdown(head, lines)}"
