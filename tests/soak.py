"""Run many random cases of a `Budget`, and store how many held and which failed.

    python tests/soak.py --cases 10000 --seed 0 --output benchmarks/results/soak.jsonl
    python tests/soak.py --seed 0 --only 4711

Case n is made from the seed and n alone; ``soak_cases.py`` says what must hold for it. The counts
are stored after every 50 cases. If the file has counts of this seed, the run goes on after them; it
first repeats the cases that have failed. With ``--growing`` only those of the cases run in which a
forward pass can be larger than any before it while others await their backward pass. With
``--blocks`` whole blocks train in each case, in place of adapters.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import torch
from soak_cases import Case, Outcome, check

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from _stored import read, run_of, write

PART = "soak"
EVERY = 50  # cases between two writes


def case_of(seed: int, number: int, *, blocks: bool = False) -> Case:
    """Case ``number`` of a seed; with whole ``blocks`` in place of adapters."""
    case = Case.drawn(random.Random(f"{seed}/{number}"))
    return replace(case, how="blocks") if blocks else case


def found(numbered: tuple[int, int], *, blocks: bool = False) -> Outcome | dict[str, Any]:
    """Check the case of this seed and number; return what came of it, or why it failed."""
    case = case_of(*numbered, blocks=blocks)
    try:
        return check(case)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"[:500]
        return {"number": numbered[1], "case": repr(case), "why": why}


def count(counts: dict[str, Any], outcome: Outcome | dict[str, Any]) -> None:
    """Count one case."""
    if isinstance(outcome, dict):
        counts["failed"].append(outcome)
        return
    counts[outcome.kind] += 1
    counts["again"] += outcome.again
    counts["measured_beyond"] += outcome.measuring > 1
    counts["measured_most"] = max(counts["measured_most"], round(outcome.measuring, 4))


def started(path: Path | None, seed: int, row: str) -> dict[str, Any]:
    """What an earlier run of this row has counted, without the cases that failed."""
    rows = read(path) if path and path.exists() else []
    same = [found for found in rows if found["part"] == PART and found["row"] == row]
    new = {"row": row, "seed": seed, "cases": 0, "held": 0, "refused": 0}
    new |= {"again": 0, "measured_beyond": 0, "measured_most": 0.0, "failed": []}
    return {key: (same or [new])[0].get(key, value) for key, value in new.items()}


def soak(
    cases: int,
    seed: int,
    path: Path | None,
    store: Callable[[Any], None],
    jobs: int = 1,
    *,
    growing: bool = False,
    blocks: bool = False,
) -> dict[str, Any]:
    """Check the cases that are left, and return the counts of all."""
    row = f"seed {seed}" + ", growing" * growing + ", whole blocks" * blocks
    counts, check_one = started(path, seed, row), partial(found, blocks=blocks)
    numbers = [n for n in range(cases) if not growing or case_of(seed, n).grows]
    again, counts["failed"] = [failed["number"] for failed in counts["failed"]], []
    start, begin = time.monotonic(), counts["cases"]
    with Pool(jobs, quiet) if jobs > 1 else nullcontext() as pool:
        checked = pool.imap if pool else map
        for outcome in checked(check_one, [(seed, number) for number in again]):
            count(counts, outcome)
        for outcome in checked(check_one, [(seed, number) for number in numbers[begin:]]):
            count(counts, outcome)
            counts["cases"] += 1
            if counts["cases"] % EVERY == 0 or counts["cases"] == len(numbers):
                each = (time.monotonic() - start) / (counts["cases"] - begin + len(again))
                failed = len(counts["failed"])
                print(f"{counts['cases']} cases, {failed} failed, {each:.2f} s each", flush=True)
                store(counts)
    store(counts)  # also where only cases that had failed were left
    return counts


def quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="how many in all")
    parser.add_argument("--seed", type=int, default=0, help="the cases are made from it")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes")
    parser.add_argument("--growing", action="store_true", help="only cases whose forwards grow")
    parser.add_argument("--blocks", action="store_true", help="whole blocks, not adapters")
    parser.add_argument("--only", type=int, help="check only the case of this number")
    parser.add_argument("--output", type=Path, help="a file of rows; it is also where to go on")
    options = parser.parse_args(arguments)
    if options.only is not None:
        case = case_of(options.seed, options.only, blocks=options.blocks)
        print(case, check(case), sep="\n")
        return 0

    def store(counts: Any) -> None:
        if options.output:
            stored = read(options.output) if options.output.exists() else []
            others = [row for row in stored if row["row"] != counts["row"]]
            write(options.output, PART, [*others, counts], run_of(__file__, arguments))

    where = options.cases, options.seed, options.output
    kind = {"growing": options.growing, "blocks": options.blocks}
    counts = soak(*where, store, options.jobs, **kind)
    for failed in counts["failed"]:
        print(failed)
    return int(bool(counts["failed"]))


if __name__ == "__main__":
    quiet()
    sys.exit(main())
