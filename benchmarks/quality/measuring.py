"""Count how often a `Budget` measures on ragged batches, and what share of the time it takes.

    python benchmarks/quality/measuring.py --steps 60 --layers 2
    python benchmarks/quality/measuring.py --output benchmarks/results/measuring.jsonl

A budget measures each batch that no measured batch covers. Here the batches are rows of similar
lengths, padded to the longest of them, so that their shapes differ from step to step. The first
measurement is counted apart, because every run has it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _shared import positive
from cost import new_loop, parser_of
from sweep import names

from dynalora_optim._costing import StepCosting

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _measure import markdown
from _stored import run_of, write

METHODS = "budget-0.40,budget-0.75"
EARLY = 100  # steps in which most shapes are new


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
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of the rows."""
    head = [
        *("method", "steps", "different lengths", "measured", f"after {EARLY} steps"),
        *("first, in steps", "the others, share of the time"),
    ]
    return markdown(head, [_line(row) for row in rows])


def _line(row: dict[str, Any]) -> list[str]:
    step = (row["seconds"] - row["first_seconds"] - row["other_seconds"]) / row["steps"]
    counts = [str(row[key]) for key in ("steps", "lengths", "measured", "measured_late")]
    others = row["other_seconds"] / row["seconds"]
    return [row["row"], *counts, f"{row['first_seconds'] / step:.1f}", f"{others:.2%}"]


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
        rows = [measure(name, options) for name in options.methods]
    except (OSError, ValueError) as error:
        sys.exit(f"measuring: {error}")
    print(table(rows))
    if options.output:
        write(options.output, "measuring", rows, run_of(__file__, arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
