"""Measure memory, FLOPs and time of a step: plain LoRA, its alternatives, and ours, in one run.

    python benchmarks/memory.py [--shape NAME] [--output runs/memory.jsonl]
    python benchmarks/memory.py --device cuda
    python benchmarks/memory.py --shape smollm2 --rounds 0   # counts only, also on a busy machine

All rows of a shape use the same frozen random weights and the same batch. *Peak* is the largest
number of bytes of tensor storage alive in forward and backward (not in the update), without
weights, optimizer state and batch. *Saved* is what autograd keeps at the end of the forward pass,
without parameters. These, the FLOPs and the operations are exact counts. A row that makes choices
is counted over 24 of them (40 if compute is bounded). Times are medians, and the steps of all rows
are timed in turn. The time of a budget is the mean over its choices; each distinct choice is timed
by itself. Times on a CPU are CPU seconds, which depend less on other processes. Peak RSS is
measured in one process per row, and is not exact.

The rows are stored, one JSON line each. The tables and the plot are made from the stored rows. What
is measured before that is kept next to them: the same command continues a run that was killed.
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

from _chunked_rows import IN_CHUNKS, rows
from _count import Counted
from _measure import Kept, median_seconds, quiet
from _memory_tables import bars_table, draw, main_table
from _progress import Progress
from _rows import REFERENCE, ops_without_adapters
from _rss import measured_apart, measured_here
from _runs import Choice, Run
from _shapes import LARGE, ON_CPU, Shape, quick
from _stored import Row, run_of, write

Rss = Callable[[str], int | None]


def measure(
    shape: Shape, *, rounds: int, rss: Rss, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Return a row of absolute numbers for each way to train, or the reason why it is refused.

    With ``rounds=0`` nothing is timed, and the times are None.
    """
    progress = progress or Progress()
    bare = shape.bare()
    frozen_ops = ops_without_adapters(shape, bare)
    known: dict[bool, dict[Choice, Counted]] = {True: {}, False: {}}  # with the loss in chunks?
    runs: dict[str, Run] = {}
    numbers: dict[str, dict[str, Any]] = {}
    refused: list[dict[str, Any]] = []
    for name, build in rows(shape).items():
        _tell(f"{shape.name}: counting {name}")
        try:
            runs[name] = build(shape, bare)
            alike = known[name.endswith(IN_CHUNKS)]
            numbers[name] = _count(shape, name, runs[name], alike, progress)
        except ValueError as problem:  # a budget too small for this model
            runs.pop(name, None)
            refused.append({"row": name, "refused": str(problem)})
            continue
        numbers[name]["adapter_ops"] = numbers[name]["ops"] - frozen_ops
    seconds: dict[str, float] = {}
    if rounds:
        _tell(f"{shape.name}: timing")
        on_cpu = shape.device == "cpu"
        kept = partial(_kept_seconds, shape.name, progress)
        seconds = _mean_seconds(runs, rounds=rounds, on_cpu=on_cpu, kept=kept)
    found = []
    for name, row in numbers.items():
        allocated = row.pop("allocated")
        if shape.device == "cpu":
            allocated = progress.once((shape.name, "rss", name), partial(rss, name))
        also = {"resident": allocated, "seconds": seconds.get(name)}
        found.append({"row": name, **row, **also, "tokens": shape.rows * shape.length})
    return found + refused


def _count(
    shape: Shape, name: str, run: Run, known: dict[Choice, Counted], progress: Progress
) -> dict[str, Any]:
    """Return the numbers of a row. If an earlier run has counted it, the run gets its choices."""
    key = (shape.name, "counts", name)
    is_new = not progress.knows(key)
    found: dict[str, Any] = progress.once(key, lambda: _counts(run, known))
    if not is_new:
        run.resume(found["choices"])
    return {number: value for number, value in found.items() if number != "choices"}


def _counts(run: Run, known: dict[Choice, Counted]) -> dict[str, Any]:
    counted = run.count(known)
    return _numbers(run, counted) | {"choices": [choice[0] for choice in run.choices]}


def _kept_seconds(
    shape: str, progress: Progress, step: str, turn: int, measure: Callable[[], float]
) -> float:
    seconds: float = progress.once((shape, "seconds", step, turn), measure)
    return seconds


def _mean_seconds(
    runs: Mapping[str, Run], *, rounds: int, on_cpu: bool, kept: Kept
) -> dict[str, float]:
    """Return the time of a step of each run: the mean over its choices of their median times."""
    parts = {name: run.timed_steps() for name, run in runs.items()}
    steps = {
        f"{name}/{number}": step
        for name, part in parts.items()
        for number, (_, step) in enumerate(part)
    }
    rare = {f"{name}/0": 2 for name, run in runs.items() if run.draws == 1 and name != REFERENCE}
    clock = time.process_time if on_cpu else time.perf_counter
    seconds = median_seconds(steps, rounds=rounds, warm_up=1, every=rare, clock=clock, kept=kept)
    return {
        name: sum(share * seconds[f"{name}/{number}"] for number, (share, _) in enumerate(part))
        for name, part in parts.items()
    }


def _numbers(run: Run, counted: Sequence[Counted]) -> dict[str, Any]:
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
        "allocated": max(c.allocated for c in counted),
        "draws": len(counted),
        "distinct": len(set(run.choices)),
        "idle": run.never_active(),
        "least_probability": run.budget.least_probability() if run.budget else None,
    }


def report(
    shape: Shape, *, rounds: int, rss: Rss, output: Path, run: Mapping[str, Any]
) -> list[Row]:
    """Measure a shape, store its rows, print its tables, and save the plot next to the rows."""
    progress = Progress(output.with_name(f"{output.stem}_{shape.name}.progress.jsonl"), run)
    measured = measure(shape, rounds=rounds, rss=rss, progress=progress)
    found: list[Row] = [*write(output, shape.name, measured, run)]
    progress.forget()
    print(f"\n## {shape.name}: {shape.rows} x {shape.length} tokens, LoRA rank {shape.rank}\n")
    print(f"{main_table(found)}\n\n{bars_table(found)}", flush=True)
    draw(output.with_name(f"memory_{shape.name}.png"), found)
    return found


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [shape.name for shape in ON_CPU]
    parser.add_argument("--shape", choices=[*names, "all"], default="all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds")
    parser.add_argument("--rounds", type=int, default=3, help="of timing; 0 counts only")
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
    on_cpu = [shape for shape in ON_CPU if options.shape in (shape.name, "all")]
    shapes = LARGE if options.device == "cuda" else on_cpu
    if options.quick:
        shapes = [quick(shape) for shape in shapes]
    if options.rss_of:
        print(measured_here(shapes[0], options.rss_of))
        return
    rounds = min(2, options.rounds) if options.quick else options.rounds
    for shape in shapes:
        rss = partial(_rss, options, shape)
        report(shape, rounds=rounds, rss=rss, output=options.output, run=run)


if __name__ == "__main__":
    main()
