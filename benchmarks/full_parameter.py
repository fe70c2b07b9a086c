"""Measure full-parameter training by blocks, and compare it with AdamW, BAdam and LoRA.

    python benchmarks/full_parameter.py [--output runs/full_parameter.jsonl]
    python benchmarks/full_parameter.py --device cuda
    python benchmarks/full_parameter.py --part planned      # 8B, 70B and 405B, on any machine

SmolLM2-135M with its real weights, in float32, takes real steps on random tokens. Two steps are
taken with the top, the middle and the lowest block active; the first of the two creates the
optimizer state. For all other positions, `estimate_memory` computes the memory; it is compared with
the measurements. The badam package (``pip install --no-deps badam``) is measured as well. Times are
medians. The steps of all rows are timed in turn, with the middle block active and without a switch
of the active block.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _full_rows import (
    ADAMW,
    CHECKPOINTED,
    FUSED,
    IDLE,
    LISA_DROP,
    LORA,
    OURS,
    PACKAGE,
    PACKAGE_CHECKPOINTED,
    ROWS,
    STEPS_EACH,
    active_state,
    blocks,
)
from _full_rows import (
    Row as Training,
)
from _full_shapes import ON_CUDA, PLANNED, QUICK, SMOLLM2, FullShape
from _full_tables import (
    Measured,
    Visit,
    bars_table,
    everywhere_table,
    largest,
    memory_table,
    planned_table,
    times_table,
)
from _measure import median_seconds, quiet
from _stored import Row, run_of, write

from dynalora_optim import StepMemory, estimate_memory, measure_step

EVERYWHERE = (PACKAGE, OURS, IDLE, PACKAGE_CHECKPOINTED, CHECKPOINTED)
TIMED = (ADAMW, LISA_DROP, PACKAGE, OURS, FUSED, IDLE, PACKAGE_CHECKPOINTED, CHECKPOINTED, LORA)
LARGE_ROWS = (ADAMW, LORA, LISA_DROP, OURS, IDLE, CHECKPOINTED)


def measured(shape: FullShape, row: Training, positions: tuple[int, ...]) -> list[Visit]:
    """Take real steps with the block at each of these positions active."""
    model = row.prepare(shape.model())
    batch = shape.batch(model)
    visits = []
    for position, optimizer in row.optimizers(model, positions):
        steps = [measure_step(model, batch, optimizer)]
        kept = active_state(optimizer)  # before the last step, which may change the active block
        steps += [measure_step(model, batch, optimizer) for _ in range(STEPS_EACH - 1)]
        visits.append(Visit(position, largest(steps), kept))
    return visits


def rehearsed(shape: FullShape, row: Training, position: int = 0) -> StepMemory:
    """Estimate the memory of a step. If a row trains one block, it is the one at ``position``."""
    model = row.prepare(shape.model())

    def make(copy: Any) -> Any:
        return next(row.optimizers(copy, (position,)))[1]

    place = [_names(model)[position]] if row.active == 1 else None
    return estimate_memory(model, shape.batch(model), make, active=place)


def _names(model: Any) -> list[str]:
    """Return the dotted paths of the blocks."""
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in blocks(model)]


def shares(model: Any) -> dict[str, float]:
    """Return the share of the parameters in one block, and outside of all blocks."""
    total = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for p in blocks(model).parameters())
    return {"block": inside / len(blocks(model)) / total, "outside": 1 - inside / total}


def timed(shape: FullShape, *, rounds: int) -> dict[str, float]:
    """Return the median seconds of a step of each row, all with the middle block active."""
    steps, middle = {}, len(blocks(shape.model())) // 2
    for name in TIMED:
        model = ROWS[name].prepare(shape.model())
        rows = ROWS[name].optimizers(model, (middle,))
        steps[name] = _step(model, shape.batch(model, shape.timed_length), rows)
    clock = time.process_time if shape.device == "cpu" else time.perf_counter
    slow = dict.fromkeys((ADAMW, LISA_DROP, FUSED, LORA), 2)
    return median_seconds(steps, rounds=rounds, warm_up=2, every=slow, clock=clock)


def _step(model: Any, batch: Any, rows: Iterator[tuple[int | None, Any]]) -> Callable[[], None]:
    _, optimizer = next(rows)

    def step() -> None:
        _ = rows  # keeps the iterator; if it is deleted, it closes its optimizer
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(shape: FullShape, *, rounds: int) -> Measured:
    """Measure, estimate and time every row."""
    count = len(blocks(shape.model()))
    positions = (count - 1, count // 2, 0)
    visits, everywhere = {}, {}
    for name, row in ROWS.items():
        _tell(f"{shape.name}: measuring {name}")
        visits[name] = measured(shape, row, positions)
    full = rehearsed(shape, ROWS[ADAMW])
    for name in EVERYWHERE:
        _tell(f"{shape.name}: rehearsing {name}")
        everywhere[name] = [rehearsed(shape, ROWS[name], k) for k in range(count)]
    _tell(f"{shape.name}: timing")
    seconds = timed(shape, rounds=rounds)
    return Measured(visits, full, everywhere, shares(shape.model()), seconds)


def report(shape: FullShape, *, rounds: int, output: Path, run: Row) -> list[Row]:
    """Measure a shape, store its rows, and print its tables."""
    rows: list[Row] = [*write(output, shape.name, measure(shape, rounds=rounds).to_rows(), run)]
    print(f"\n### {shape.name}: {shape.rows} x {shape.length} tokens\n")
    print(memory_table(rows))
    print("\nPeak / AdamW's peak, at all positions.\n\n" + everywhere_table(rows))
    print(f"\nTimes, {shape.rows} x {shape.timed_length} tokens, {rounds} rounds.\n")
    print(f"{times_table(rows)}\n\n{bars_table(rows)}", flush=True)
    return rows


def plan(shapes: Sequence[FullShape], *, output: Path, run: Row) -> list[Row]:
    """Estimate the large shapes, store the rows, and print their table."""
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for name in LARGE_ROWS:
            _tell(f"{shape.name}: {name}")
            memory = asdict(rehearsed(shape, ROWS[name]))
            rows.append({"row": name, "shape": shape.name, "memory": memory})
    stored: list[Row] = [*write(output, "planned", rows, run)]
    print("\n### Rehearsed on the meta device: bfloat16, 1 x 2048 tokens\n")
    print(planned_table(stored), flush=True)
    return stored


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--part", choices=["measured", "planned", "both"], default="both")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few rounds")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("runs/full_parameter.jsonl"))
    options = parser.parse_args(arguments)
    shape = ON_CUDA if options.device == "cuda" else SMOLLM2
    rounds = options.rounds
    if options.quick:
        shape, rounds = QUICK, 2
    run = run_of(__file__, arguments)
    with quiet(Warning):  # of the badam package, about float32
        if options.part != "planned":
            report(shape, rounds=rounds, output=options.output, run=run)
        if options.part != "measured":
            plan([QUICK] if options.quick else PLANNED, output=options.output, run=run)


if __name__ == "__main__":
    main()
