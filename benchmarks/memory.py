"""What a step takes: memory, FLOPs and time, of plain LoRA, its rivals and ours, in one run.

    python benchmarks/memory.py [--shape roberta|llama|both] [--output runs/memory]
    python benchmarks/memory.py --device cuda

All rows of a shape train the same frozen random weights on the same batch. *Peak* is the most bytes
of tensor storage alive in forward and backward (not the update) above weights, optimizer state and
batch; *saved* is what autograd keeps at the end of the forward, parameters left out. Both, and the
FLOPs and operations, are counted exactly; a row that draws its modules anew is counted over 24
reallocations (40 where compute is bounded). Times are medians of steps taken side by side, each
draw in a step of its own; on a CPU they are CPU seconds, which other processes stretch less. Peak
RSS is that of a process per row, and noisy.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import transformers
from _bars import Bar, Result, bars, point
from _count import Counted
from _fronts import Series, plot
from _measure import hardware, markdown, median_seconds
from _rows import (
    ALL_ACTIVE,
    FULL,
    PEER_FRONT,
    RANDOM,
    REFERENCE,
    budget_name,
    ops_without_adapters,
    rows,
)
from _rss import measured_apart, measured_here
from _runs import Choice, Run
from _shapes import LARGE, LLAMA, ROBERTA, Shape, quick

Rss = Callable[[str], int | None]
MIB = 2**20


def measure(
    shape: Shape, *, rounds: int, rss: Rss
) -> tuple[dict[str, Result], dict[str, float], dict[str, str]]:
    """Return each row's numbers, what a ratio of 1 stands for, and why rows are missing."""
    bare = shape.bare()
    frozen_ops = ops_without_adapters(shape, bare)
    known: dict[Choice, Counted] = {}
    runs: dict[str, Run] = {}
    counted: dict[str, list[Counted]] = {}
    refused: dict[str, str] = {}
    for name, build in rows(shape).items():
        _tell(f"{shape.name}: counting {name}")
        run = build(shape, bare)
        try:
            counted[name] = run.count(known)
            runs[name] = run
        except ValueError as problem:  # a budget too small for this model
            refused[name] = str(problem)
    _tell(f"{shape.name}: timing")
    fixed = {name: 2 for name, run in runs.items() if run.draws == 1 and name != REFERENCE}
    steps = {name: run.step for name, run in runs.items()}
    clock = time.process_time if shape.device == "cpu" else time.perf_counter
    seconds = median_seconds(steps, rounds=rounds, warm_up=1, every=fixed, clock=clock)
    unit = _means(counted[REFERENCE])
    unit |= {"seconds": seconds[REFERENCE], "added": unit["ops"] - frozen_ops}
    tokens = shape.rows * shape.length
    results = {}
    for name, run in runs.items():
        results[name] = result = _result(run, counted[name], seconds[name], unit)
        result.tokens = tokens / seconds[name]
        allocated = max(c.allocated for c in counted[name])
        result.resident = rss(name) if shape.device == "cpu" else allocated
    return results, unit, refused


def _result(run: Run, counted: Sequence[Counted], seconds: float, unit: dict[str, float]) -> Result:
    mean = _means(counted)
    frozen_ops = unit["ops"] - unit["added"]
    return Result(
        peak=max(c.peak for c in counted) / unit["peak"],
        peak_mean=mean["peak"] / unit["peak"],
        saved=max(c.saved for c in counted) / unit["saved"],
        saved_mean=mean["saved"] / unit["saved"],
        forward=mean["forward"] / unit["forward"],
        backward=mean["backward"] / unit["backward"],
        ops=mean["ops"],
        added=(mean["ops"] - frozen_ops) / unit["added"],
        time=seconds / unit["seconds"],
        draws=len(counted),
        distinct=len(set(run.choices)),
        idle=run.never_active(),
        least_probability=run.budget.least_probability() if run.budget else None,
    )


def _means(counted: Sequence[Counted]) -> dict[str, float]:
    names = ("peak", "saved", "forward", "backward", "ops")
    return {name: statistics.fmean(getattr(c, name) for c in counted) for name in names}


def report(shape: Shape, *, rounds: int, rss: Rss, output: Path) -> list[Bar]:
    """Measure a shape, print its tables, and write its numbers and fronts."""
    results, unit, refused = measure(shape, rounds=rounds, rss=rss)
    found = bars(results, shape.slack)
    print(f"\n## {shape.name}: {shape.rows} x {shape.length} tokens, LoRA rank {shape.rank}\n")
    print(f"{hardware()}; {rounds} rounds\n")
    print(
        f"1.000 is {unit['peak'] / MIB:.1f} MiB peak, {unit['saved'] / MIB:.1f} MiB saved, "
        f"{unit['forward'] / 1e9:.1f} and {unit['backward'] / 1e9:.1f} GFLOPs, "
        f"{unit['added']:.0f} added ops, {unit['seconds']:.3f} s.\n"
    )
    print(table(results, resident="peak RSS" if shape.device == "cpu" else "CUDA peak"))
    for name, problem in refused.items():
        print(f"\n{name} is missing: {problem}")
    print("\n" + markdown(["bar", "value", "limit", ""], [bar.line() for bar in found]), flush=True)
    output.mkdir(parents=True, exist_ok=True)
    numbers = {
        "hardware": hardware(),
        "unit": unit,
        "rows": {name: asdict(result) for name, result in results.items()},
        "refused": refused,
        "bars": [bar.line() for bar in found],
    }
    (output / f"memory_{shape.name}.json").write_text(json.dumps(numbers, indent=2))
    draw(output / f"memory_{shape.name}.png", shape, results)
    return found


def table(results: dict[str, Result], *, resident: str) -> str:
    header = ["row", "peak, largest", "mean", "saved, largest", "mean", "forward FLOPs"]
    header += ["backward FLOPs", "ops", "added ops, ratio", "time", "tokens/s"]
    header += ["draws (distinct)", f"{resident} (MiB)"]
    lines = []
    for name, r in results.items():
        ratios = [r.peak, r.peak_mean, r.saved, r.saved_mean, r.forward, r.backward]
        line = [name, *(f"{ratio:.3f}" for ratio in ratios), f"{r.ops:.0f}", f"{r.added:.2f}"]
        line += [f"{r.time:.3f}", f"{r.tokens:.0f}", f"{r.draws} ({r.distinct})"]
        lines.append([*line, "-" if r.resident is None else f"{r.resident / MIB:.0f}"])
    return markdown(header, lines)


def draw(path: Path, shape: Shape, results: dict[str, Result]) -> None:
    """Plot the fronts."""
    costs = {"backward": "mean backward FLOPs", "time": "median step time"}
    title = f"{shape.name}: largest peak of a step against its cost"
    plot(path, title, {label: _series(shape, results, cost) for cost, label in costs.items()})


def _series(shape: Shape, results: dict[str, Result], cost: str) -> Series:
    peers = {name.removeprefix("peft, ").removesuffix(" checkpointed"): name for name in PEER_FRONT}
    lines = {"peft LoRA, blocks checkpointed": peers}
    for memory, compute in sorted(shape.budgets, key=lambda budget: budget[1]):
        line = lines.setdefault(f"ours, Budget(memory, {compute:g})", {})
        line[f"{memory:g}"] = budget_name(memory, compute)
    lines |= {name: {"": name} for name in (ALL_ACTIVE, RANDOM, FULL)}
    series = {
        legend: {label: point(results[n], cost) for label, n in names.items() if n in results}
        for legend, names in lines.items()
    }
    return {legend: points for legend, points in series.items() if points}


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["roberta", "llama", "both"], default="both")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--output", type=Path, default=Path("runs/memory"))
    parser.add_argument("--no-rss", action="store_true", help="start no process per row")
    parser.add_argument("--rss-of", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _rss(options: argparse.Namespace, shape: Shape, name: str) -> int | None:
    if options.no_rss:
        return None
    return measured_apart(name, "--shape", shape.name, *(["--quick"] * options.quick))


def main(arguments: Sequence[str] | None = None) -> None:
    options = _arguments(arguments)
    on_cpu = [shape for shape in (ROBERTA, LLAMA) if options.shape in (shape.name, "both")]
    shapes = LARGE if options.device == "cuda" else on_cpu
    if options.quick:
        shapes = [quick(shape) for shape in shapes]
    if options.rss_of:
        print(measured_here(shapes[0], options.rss_of))
        return
    rounds = 2 if options.quick else options.rounds
    for shape in shapes:
        report(shape, rounds=rounds, rss=partial(_rss, options, shape), output=options.output)


if __name__ == "__main__":  # who calls main() keeps logging and warnings as they are
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("dynalora_optim").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    main()
