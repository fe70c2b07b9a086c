"""One part of the kit: its rows, one after another, each in a process of its own.

    python -m gpu.part memory_and_speed OUTDIR --seconds 200 [--dry-run]

The kit starts it; it is not meant to be called by hand.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time
import warnings
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer would import it, in every child anew
import transformers
from gpu._apart import Row, answer, run_apart
from gpu._lines import Lines, given_facts

MODULES = {
    "workspaces": "gpu.workspaces",
    "memory_and_speed": "gpu.lora",
    "full_parameters": "gpu.full",
    "overhead": "gpu.launches",
}
LEAST = 3.0  # seconds: with less left no row is begun


def rows_of(part: str, *, dry_run: bool) -> list[Row]:
    """Return the rows of a part, in their order."""
    found: list[Row] = importlib.import_module(MODULES[part]).rows(dry_run=dry_run)
    return found


def run(part: str, folder: Path, *, seconds: float, dry_run: bool) -> None:
    """Measure the rows until the time is over; the rest is skipped, and says so."""
    end = time.monotonic() + seconds
    lines = Lines(folder, part, given_facts())
    for row in rows_of(part, dry_run=dry_run):
        left = end - time.monotonic()
        if left < LEAST:
            lines.add(row.name, "skipped", reason=f"the part's {seconds:.0f} s are over")
            continue
        again = ["-m", "gpu.part", part, str(folder), "--row", row.name]
        done = run_apart(row, seconds=left, again=[*again, *["--dry-run"] * dry_run])
        lines.add(
            row.name, done.status, reason=done.reason, seconds=done.seconds, values=done.values
        )


def quiet() -> None:
    """Leave the output to the rows."""
    warnings.filterwarnings("ignore")
    logging.getLogger("dynalora_optim").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()


def main() -> None:
    """Run a part, or, for a child that could not be forked, one row of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(MODULES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--answer-to", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.dry_run:
        torch.set_num_threads(1)
    if options.row is None:
        run(options.part, options.folder, seconds=options.seconds, dry_run=options.dry_run)
        return
    rows = {row.name: row for row in rows_of(options.part, dry_run=options.dry_run)}
    if options.answer_to is None:
        sys.exit("--row is for the kit's own use; leave it out.")
    answer(rows[options.row].work, options.answer_to)


if __name__ == "__main__":
    main()
