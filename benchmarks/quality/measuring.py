"""Count how often a `Budget` measures on ragged batches, and what share of the time it takes.

    python benchmarks/quality/measuring.py --steps 60 --layers 2 --methods budget-0.75
    python benchmarks/quality/measuring.py --output benchmarks/results/measuring.jsonl

A budget measures each batch that no measured batch covers. Here the batches are rows of similar
lengths, padded to the longest of them, so that their shapes differ from step to step. The first
measurement is counted apart, because every run has it: in steps of LoRA on the same batch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _shared import positive
from _training import Loop, prepare, started
from cost import RATE, new_loop, parser_of
from sweep import names, settings

from dynalora_optim import DynamicAllocationOptimizer, LiveBytes
from dynalora_optim._costing import StepCosting

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _budget_tables import measuring as measuring_table
from _measure import median_seconds
from _stored import run_of, write

METHODS = "budget-0.40,budget-0.75"
EARLY = 100  # steps in which most shapes are new
REPEATS = 5  # steps and measurements of one batch


@contextmanager
def timed_measurements(found: list[float]) -> Iterator[None]:
    """Add the CPU seconds of each measurement to ``found``."""
    plain = StepCosting.measure

    def measure(self: StepCosting, *args: Any) -> Any:
        start = time.process_time()
        try:
            return plain(self, *args)
        finally:
            found.append(time.process_time() - start)

    setattr(StepCosting, plain.__name__, measure)
    try:
        yield
    finally:
        setattr(StepCosting, plain.__name__, plain)


def first(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Return what measuring the first batch takes, in steps of LoRA on this batch.

    The two are done in turn several times; CPU times are compared by their medians.
    """
    chosen = settings(options, options.task, name, RATE)
    work = prepare(chosen.suite, options.task, chosen.model, chosen.max_length)
    model, optimizer = started(chosen, work)
    assert isinstance(optimizer, DynamicAllocationOptimizer)
    loops = new_loop(options.task, "lora", options), Loop(model, optimizer, chosen, work)
    batch = next(loops[0].batches())
    works: dict[str, Callable[[], object]] = {
        "step": partial(loops[0].step, batch),
        "measure": partial(optimizer.memory_report, **batch),  # it measures this batch again
    }
    for loop in loops:  # what comes first imports and allocates
        loop.step(batch)
    seconds = median_seconds(works, rounds=REPEATS, warm_up=0, clock=time.process_time)
    flops = {what: counted(work) for what, work in works.items()}
    for loop in loops:
        loop.close()
    return {
        "first_flops": flops["measure"] / flops["step"],
        "first_time": seconds["measure"] / seconds["step"],
    }


def counted(work: Callable[[], object]) -> int:
    """Return the FLOPs of some work."""
    with LiveBytes() as memory:
        work()
    return memory.flops


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train with a method, and return a row of counts and seconds."""
    loop = new_loop(options.task, name, options)
    seconds: list[float] = []
    steps_of: list[int] = []
    lengths = set()
    start = time.process_time()
    with timed_measurements(seconds):
        for step, batch in enumerate(loop.batches()):
            lengths.add(batch["input_ids"].shape[1])
            loop.step(batch)
            steps_of += [step] * (len(seconds) - len(steps_of))
    total = time.process_time() - start
    loop.close()
    return {
        "row": name,
        "steps": options.steps,
        "lengths": len(lengths),
        "measured": len(seconds),
        "measured_late": sum(step >= EARLY for step in steps_of),
        "seconds": total,
        "first_seconds": seconds[0],
        "other_seconds": sum(seconds[1:]),
        **first(name, options),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--methods", type=names, default=METHODS, help="names, with commas")
    add("--task", default="r8", help="a task of the offline suite, or a CSV file")
    add("--steps", type=positive, default=500, help="optimizer steps of each method")
    add("--max-length", type=positive, default=128, help="longer rows are cut")
    add("--batch-size", type=positive, default=8, help="rows per step")
    add("--output", type=Path, help="a file of rows; they replace its older ones")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and store the rows."""
    options = parse(arguments)
    torch.set_num_threads(1)
    try:
        found = [measure(name, options) for name in options.methods]
    except (OSError, ValueError) as error:
        sys.exit(f"measuring: {error}")
    run = run_of(__file__, arguments)
    print(measuring_table([{**row, "run": run} for row in found]))
    if options.output:
        write(options.output, "measuring", found, run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
