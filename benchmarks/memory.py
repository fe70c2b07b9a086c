"""Measure memory, FLOPs and time of a step: plain LoRA, its alternatives, and ours, in one run.

    python benchmarks/memory.py [--shape roberta|llama|both] [--output runs/memory.jsonl]
    python benchmarks/memory.py --device cuda

All rows of a shape use the same frozen random weights and the same batch. *Peak* is the largest
number of bytes of tensor storage alive in forward and backward (not in the update), without
weights, optimizer state and batch. *Saved* is what autograd keeps at the end of the forward pass,
without parameters. These, the FLOPs and the operations are exact counts. A row that makes choices
is counted over 24 of them (40 if compute is bounded). Times are medians, and the steps of all rows
are timed in turn. The time of a budget is the mean over its choices; each distinct choice is timed
by itself. Times on a CPU are CPU seconds, which depend less on other processes. Peak RSS is
measured in one process per row, and is not exact.

The rows are stored, one JSON line each. The tables and the plot are made from the stored rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from _count import Counted
from _measure import median_seconds, quiet
from _memory_tables import bars_table, draw, main_table
from _rows import REFERENCE, ops_without_adapters, rows
from _rss import measured_apart, measured_here
from _runs import Choice, Run
from _shapes import LARGE, LLAMA, ROBERTA, Shape, quick
from _stored import Row, run_of, write

Rss = Callable[[str], int | None]


def measure(shape: Shape, *, rounds: int, rss: Rss) -> list[dict[str, Any]]:
    """Return a row of absolute numbers for each way to train, or the reason why it is refused."""
    bare = shape.bare()
    frozen_ops = ops_without_adapters(shape, bare)
    known: dict[Choice, Counted] = {}
    runs: dict[str, Run] = {}
    counted: dict[str, list[Counted]] = {}
    refused: list[dict[str, Any]] = []
    for name, build in rows(shape).items():
        _tell(f"{shape.name}: counting {name}")
        run = build(shape, bare)
        try:
            counted[name] = run.count(known)
            runs[name] = run
        except ValueError as problem:  # a budget too small for this model
            refused.append({"row": name, "refused": str(problem)})
    _tell(f"{shape.name}: timing")
    seconds = _mean_seconds(runs, rounds=rounds, on_cpu=shape.device == "cpu")
    found = []
    for name, run in runs.items():
        row = {"row": name, **_numbers(run, counted[name], frozen_ops)}
        allocated = max(c.allocated for c in counted[name])
        row["resident"] = rss(name) if shape.device == "cpu" else allocated
        found.append(row | {"seconds": seconds[name], "tokens": shape.rows * shape.length})
    return found + refused


def _mean_seconds(runs: Mapping[str, Run], *, rounds: int, on_cpu: bool) -> dict[str, float]:
    """Return the time of a step of each run: the mean over its choices of their median times."""
    parts = {name: run.timed_steps() for name, run in runs.items()}
    steps = {
        f"{name}/{number}": step
        for name, part in parts.items()
        for number, (_, step) in enumerate(part)
    }
    rare = {f"{name}/0": 2 for name, run in runs.items() if run.draws == 1 and name != REFERENCE}
    clock = time.process_time if on_cpu else time.perf_counter
    seconds = median_seconds(steps, rounds=rounds, warm_up=1, every=rare, clock=clock)
    return {
        name: sum(share * seconds[f"{name}/{number}"] for number, (share, _) in enumerate(part))
        for name, part in parts.items()
    }


def _numbers(run: Run, counted: Sequence[Counted], frozen_ops: int) -> dict[str, Any]:
    mean = {
        name: statistics.fmean(getattr(c, name) for c in counted)
        for name in ("peak", "saved", "forward", "backward", "ops")
    }
    return {
        "peak": max(c.peak for c in counted),
        "peak_mean": mean["peak"],
        "saved": max(c.saved for c in counted),
        "saved_mean": mean["saved"],
        "forward": mean["forward"],
        "backward": mean["backward"],
        "ops": mean["ops"],
        "adapter_ops": mean["ops"] - frozen_ops,
        "draws": len(counted),
        "distinct": len(set(run.choices)),
        "idle": run.never_active(),
        "least_probability": run.budget.least_probability() if run.budget else None,
    }


def report(
    shape: Shape, *, rounds: int, rss: Rss, output: Path, run: Mapping[str, Any]
) -> list[Row]:
    """Measure a shape, store its rows, print its tables, and save the plot next to the rows."""
    found: list[Row] = [*write(output, shape.name, measure(shape, rounds=rounds, rss=rss), run)]
    print(f"\n## {shape.name}: {shape.rows} x {shape.length} tokens, LoRA rank {shape.rank}\n")
    print(f"{main_table(found)}\n\n{bars_table(found)}", flush=True)
    draw(output.with_name(f"memory_{shape.name}.png"), found)
    return found


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["roberta", "llama", "both"], default="both")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/memory.jsonl"))
    parser.add_argument("--no-rss", action="store_true", help="do not measure peak RSS")
    parser.add_argument("--rss-of", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _rss(options: argparse.Namespace, shape: Shape, name: str) -> int | None:
    if options.no_rss:
        return None
    return measured_apart(name, "--shape", shape.name, *(["--quick"] * options.quick))


def main(arguments: Sequence[str] | None = None) -> None:
    options = _arguments(arguments)
    with quiet(FutureWarning):
        _measure_all(options, run_of(__file__, arguments))


def _measure_all(options: argparse.Namespace, run: Mapping[str, Any]) -> None:
    on_cpu = [shape for shape in (ROBERTA, LLAMA) if options.shape in (shape.name, "both")]
    shapes = LARGE if options.device == "cuda" else on_cpu
    if options.quick:
        shapes = [quick(shape) for shape in shapes]
    if options.rss_of:
        print(measured_here(shapes[0], options.rss_of))
        return
    rounds = 2 if options.quick else options.rounds
    for shape in shapes:
        rss = partial(_rss, options, shape)
        report(shape, rounds=rounds, rss=rss, output=options.output, run=run)


if __name__ == "__main__":
    main()
