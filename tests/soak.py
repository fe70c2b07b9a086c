"""Run many random cases of a `Budget`, and store how many held and which failed.

    python tests/soak.py --cases 10000 --seed 0 --output benchmarks/results/soak.jsonl
    python tests/soak.py --seed 0 --only 4711

Case n is made from the seed and n alone; ``soak_cases.py`` says what must hold for it. The counts
are stored after every 50 cases. If the file has counts of this seed, the run goes on after them; it
first repeats the cases that have failed.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from soak_cases import Case, check

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from _stored import read, run_of, write

PART = "soak"
EVERY = 50  # cases between two writes


def case_of(seed: int, number: int) -> Case:
    """Case ``number`` of a seed."""
    return Case.drawn(random.Random(f"{seed}/{number}"))


def found(counts: dict[str, Any], seed: int, number: int) -> None:
    """Check one case, and count what comes of it."""
    case = case_of(seed, number)
    try:
        outcome = check(case)
        counts[outcome.kind] += 1
        counts["measured_beyond"] += outcome.measuring > 1
        counts["measured_most"] = max(counts["measured_most"], round(outcome.measuring, 4))
    except Exception as error:
        why = f"{type(error).__name__}: {error}"[:500]
        counts["failed"].append({"number": number, "case": repr(case), "why": why})


def started(path: Path | None, seed: int) -> dict[str, Any]:
    """What an earlier run of this seed has counted, without the cases that failed."""
    rows = read(path) if path and path.exists() else []
    of_seed = [row for row in rows if row["part"] == PART and row["seed"] == seed]
    new = {"row": f"seed {seed}", "seed": seed, "cases": 0, "held": 0, "refused": 0}
    new |= {"measured_beyond": 0, "measured_most": 0.0, "failed": []}
    return {key: (of_seed or [new])[0][key] for key in new}


def soak(cases: int, seed: int, path: Path | None, store: Callable[[Any], None]) -> dict[str, Any]:
    """Check the cases that are left, and return the counts of all."""
    counts = started(path, seed)
    again, counts["failed"] = counts["failed"], []
    start, begin = time.monotonic(), counts["cases"]
    for failed in again:
        found(counts, seed, failed["number"])
    for number in range(begin, cases):
        found(counts, seed, number)
        counts["cases"] = number + 1
        if counts["cases"] % EVERY == 0 or counts["cases"] == cases:
            each = (time.monotonic() - start) / (counts["cases"] - begin + len(again))
            line = f"{counts['cases']} cases, {len(counts['failed'])} failed, {each:.2f} s each"
            print(line, flush=True)
            store(counts)
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="how many in all")
    parser.add_argument("--seed", type=int, default=0, help="the cases are made from it")
    parser.add_argument("--only", type=int, help="check only the case of this number")
    parser.add_argument("--output", type=Path, help="a file of rows; it is also where to go on")
    options = parser.parse_args(arguments)
    if options.only is not None:
        case = case_of(options.seed, options.only)
        print(case, check(case), sep="\n")
        return 0

    def store(counts: Any) -> None:
        if options.output:
            write(options.output, PART, [counts], run_of(__file__, arguments))

    counts = soak(options.cases, options.seed, options.output, store)
    for failed in counts["failed"]:
        print(failed)
    return int(bool(counts["failed"]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.exit(main())
