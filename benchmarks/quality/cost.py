"""Measure what a step of each method costs: FLOPs and CPU time, side by side in one run.

    python benchmarks/quality/cost.py --tasks bbc --methods lora,static --steps 40
    python benchmarks/quality/cost.py --output benchmarks/results/quality/costs.jsonl

All methods take the same steps of a task in turn, on the same batches. FLOPs are counted in every
second step, forward and backward with all that is recomputed, and the other steps are timed. So
both are means over the choices that a method made. The time of a step includes its update.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _shared import positive
from _suite import SUITES
from _training import Loop, prepare, started
from sweep import names, settings

from dynalora_optim import LiveBytes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _measure import markdown
from _stored import run_of, write

TASKS = ("vader_tweets", "bbc", "r8")
METHODS = "lora,lora-checkpointed,static,random,budget-0.40,budget-0.30"
RATE = 1e-3  # it does not change the cost


def measure(task: str, methods: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row of each method: the means of FLOPs and CPU seconds of a step."""
    loops = {name: new_loop(task, name, options) for name in methods}
    flops: dict[str, list[int]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    batches = zip(*(loop.batches() for loop in loops.values()), strict=True)
    for turn, batch_of_each in enumerate(batches):
        turns = list(zip(loops.items(), batch_of_each, strict=True))
        first = turn // 2 % len(turns)  # no method always follows the same other one
        for (name, loop), batch in [*turns[first:], *turns[:first]]:
            if turn % 2:
                with LiveBytes() as counted:
                    loop.step(batch)
                flops[name].append(counted.flops)
            else:
                start = time.process_time()
                loop.step(batch)
                seconds[name].append(time.process_time() - start)
    for loop in loops.values():
        loop.close()
    return [
        {
            "row": name,
            "flops": statistics.fmean(flops[name]),
            "seconds": statistics.fmean(seconds[name][1:]),  # the first step allocates
        }
        for name in methods
    ]


def new_loop(task: str, name: str, options: argparse.Namespace) -> Loop:
    """Return the loop of a method on a task."""
    chosen = settings(options, task, name, RATE)
    work = prepare(chosen.suite, task, chosen.model, chosen.max_length)
    return Loop(*started(chosen, work), chosen, work)


def table(rows: Sequence[dict[str, Any]], reference: str) -> str:
    """Return a table of the rows of one task, as ratios to a method."""
    (base,) = (row for row in rows if row["row"] == reference)
    lines = [
        [row["row"], *(f"{row[key] / base[key]:.3f}" for key in ("flops", "seconds"))]
        for row in rows
    ]
    return markdown(["method", "FLOPs", "CPU time"], lines)


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of what `new_loop` needs; ``doc`` is that of the script."""
    parser = argparse.ArgumentParser(
        description=(doc or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", choices=SUITES, default="offline", help="offline: sentences; language: an LM")
    add("--model", help="hub id or local folder; None: the suite's")
    add("--layers", type=positive, help="use only this many blocks, for a quick try")
    parser.set_defaults(max_length=None)
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--tasks", type=names, default=list(TASKS), help="names of the suite, with commas")
    add("--methods", type=names, default=METHODS, help="names, with commas; the first is 1.0")
    add("--steps", type=positive, default=160, help="steps of each method on each task")
    add("--batch-size", type=positive, default=16, help="rows per step")
    add("--output", type=Path, help="a file of rows; the rows of a task replace its older ones")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table for each task, and store the rows."""
    options = parse(arguments)
    torch.set_num_threads(1)
    for task in options.tasks:
        try:
            rows = measure(task, options.methods, options)
        except (OSError, ValueError) as error:
            sys.exit(f"cost: {error}")
        print(f"{task}\n{table(rows, options.methods[0])}\n", flush=True)
        if options.output:
            write(options.output, task, rows, run_of(__file__, arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
