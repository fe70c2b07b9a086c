"""Count what it costs to train all modules in less memory, by recomputing blocks.

    python benchmarks/recompute.py [--output runs/recompute.jsonl]

A `Budget` with ``base="topk"`` and no bound on compute trains all modules in every step, as a plain
optimizer does, and recomputes as many blocks as the memory demands. The peer is peft's LoRA with
every n-th block checkpointed, with torch's loss in chunks where ours is in chunks. Peaks and FLOPs
are exact counts of one step. Nothing is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from _chunked_rows import CHUNKED_FRONT, of_pefts_peak, torch_chunked
from _count import count
from _measure import quiet
from _recompute_tables import recompute_table
from _rows import PEER_FRONT, REFERENCE, Build, pefts
from _runs import Run
from _shapes import ROBERTA, SMOLLM2, Shape, quick
from _stored import Row, run_of, write

SHARES = {  # of the peak of peft's LoRA
    ROBERTA.name: (0.775, 0.55, 0.4, 0.168),
    SMOLLM2.name: (0.5, 0.37, 0.15, 0.07),
}


def rows_of(shape: Shape) -> dict[str, Build]:
    """Return the rows of a shape, by name: peft's front, and then ours."""
    front, build = (CHUNKED_FRONT, torch_chunked) if shape.chunk else (PEER_FRONT, pefts)
    peers = {name: partial(build, every=every) for name, every in front.items()}
    ours = partial(of_pefts_peak, compute=None, base="topk")
    budgets = {
        f"ours, Budget({share:g})": partial(ours, memory=share) for share in SHARES[shape.name]
    }
    return {REFERENCE: pefts, **peers, **budgets}


def counted(run: Run) -> dict[str, Any]:
    """Return the counts of a step, after two in which a budget sees how the loop works."""
    for _ in range(2):
        run.step()
    found = count(run.loss)
    active = getattr(run.optimizer, "active_groups", [])
    return {
        "peak": found.peak,
        "flops": found.forward + found.backward,
        "inactive": len(getattr(run.optimizer, "groups", [])) - len(active),
    }


def measure(shape: Shape) -> list[dict[str, Any]]:
    bare = shape.bare()
    found = []
    for name, build in rows_of(shape).items():
        print(f"{shape.name}: {name}", flush=True)
        found.append({"row": name, **counted(build(shape, bare))})
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--output", type=Path, default=Path("runs/recompute.jsonl"))
    options = parser.parse_args(arguments)
    run = run_of(__file__, arguments)
    rows: list[Row] = []
    with quiet(FutureWarning):
        for shape in (ROBERTA, SMOLLM2):
            found = measure(quick(shape) if options.quick else shape)
            rows += write(options.output, shape.name, found, run)
    print(recompute_table(rows))


if __name__ == "__main__":
    main()
