"""Run one part of the kit: its rows one after another, each in a separate process.

    python -m gpu.part memory_and_speed OUTDIR [--dry-run]

The kit calls this script. You do not need to call it yourself.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import re
import sys
import time
import warnings
from pathlib import Path

import torch
import torch._dynamo  # imported once here; else each child would import it for its optimizer
import transformers
from gpu._apart import Row, answer, run_apart
from gpu._lines import Lines, given_facts

MODULES = {
    "workspaces": "gpu.workspaces",
    "memory_and_speed": "gpu.lora",
    "full_parameters": "gpu.full",
    "overhead": "gpu.launches",
}
LEAST = 3.0  # seconds; with less time left, no row is started
ENDING = 5.0  # seconds that it may take to kill a process that holds memory of the GPU


def rows_of(part: str, *, dry_run: bool, pattern: str = "") -> list[Row]:
    """Return the rows of a part whose names have the pattern in them, in their order."""
    found: list[Row] = importlib.import_module(MODULES[part]).rows(dry_run=dry_run)
    return [row for row in found if re.search(pattern, row.name)]


def run(part: str, folder: Path, *, until: float, dry_run: bool, pattern: str = "") -> None:
    """Measure the rows until `time.monotonic` returns ``until``; write the others as skipped."""
    lines = Lines(folder, part, given_facts())
    for row in rows_of(part, dry_run=dry_run, pattern=pattern):
        left = until - time.monotonic() - ENDING
        if left < LEAST:
            lines.add(row.name, "skipped", reason="no time is left for it")
            continue
        again = ["-m", "gpu.part", part, str(folder), "--row", row.name]
        done = run_apart(row, seconds=left, again=[*again, *["--dry-run"] * dry_run])
        lines.add(
            row.name, done.status, reason=done.reason, seconds=done.seconds, values=done.values
        )


def quiet() -> None:
    """Hide warnings and log messages, so that only the rows are printed."""
    warnings.filterwarnings("ignore")
    logging.getLogger("dynalora_optim").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()


def main() -> None:
    """Run a part, or one row of it, for a child that could not be forked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(MODULES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--until", type=float, default=math.inf, help="a time.monotonic()")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rows", default="")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--answer-to", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.dry_run:
        torch.set_num_threads(1)
    if options.row is None:
        limits = {"until": options.until, "dry_run": options.dry_run}
        run(options.part, options.folder, **limits, pattern=options.rows)
        return
    rows = {row.name: row for row in rows_of(options.part, dry_run=options.dry_run)}
    if options.answer_to is None:
        sys.exit("--row is only for the kit itself; leave it out.")
    answer(rows[options.row].work, options.answer_to)


if __name__ == "__main__":
    main()
