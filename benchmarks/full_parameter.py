"""Full-parameter training by blocks: what a step takes and costs, beside AdamW, BAdam and LoRA.

    python benchmarks/full_parameter.py [--output runs/full]
    python benchmarks/full_parameter.py --device cuda
    python benchmarks/full_parameter.py --part planned      # 8B, 70B and 405B, on any machine

SmolLM2-135M with its real weights, in float32, takes real steps on random tokens: two each with the
top, the middle and the lowest block active (the first step creates the state that the second one
holds). What every other position takes is rehearsed by `estimate_memory`, which is held against
what is measured. The badam package (``pip install --no-deps badam``) runs beside ours. Times are
medians of steps taken side by side, all with the middle block active, without its switches.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import transformers
from _bars import Bar
from _full_rows import (
    ADAMW,
    CHECKPOINTED,
    FUSED,
    IDLE,
    LISA_DROP,
    LORA,
    OFFLOAD,
    OURS,
    PACKAGE,
    PACKAGE_CHECKPOINTED,
    ROWS,
    STEPS_EACH,
    Row,
    active_state,
    blocks,
)
from _full_shapes import ON_CUDA, PLANNED, QUICK, SMOLLM2, FullShape
from _measure import hardware, markdown, median_seconds

from dynalora_optim import StepMemory, estimate_memory, measure_step

MIB, GIB = 2**20, 2**30
EVERYWHERE = (PACKAGE, OURS, IDLE, PACKAGE_CHECKPOINTED, CHECKPOINTED)
TIMED = (ADAMW, LISA_DROP, PACKAGE, OURS, FUSED, IDLE, PACKAGE_CHECKPOINTED, CHECKPOINTED, LORA)
LARGE_ROWS = (ADAMW, LORA, LISA_DROP, OURS, IDLE, CHECKPOINTED)
PEERS = {OURS: PACKAGE, CHECKPOINTED: PACKAGE_CHECKPOINTED}  # like with like
CATEGORIES = [name for name in StepMemory.__dataclass_fields__ if name != "master_weights"]


@dataclass(frozen=True)
class Visit:
    """What the steps at one position took at most; ``active_state`` is of what is active then."""

    position: int | None
    memory: StepMemory
    active_state: int


def largest(found: Sequence[StepMemory]) -> StepMemory:
    """Return the largest of each category."""
    return StepMemory(*map(max, zip(*map(astuple, found), strict=True)))


def measured(shape: FullShape, row: Row, positions: tuple[int, ...]) -> list[Visit]:
    """Take real steps at each of these positions."""
    model = row.prepare(shape.model())
    batch = shape.batch(model)
    visits = []
    for position, optimizer in row.optimizers(model, positions):
        steps = [measure_step(model, batch, optimizer)]
        kept = active_state(optimizer)  # before the last step may move on
        steps += [measure_step(model, batch, optimizer) for _ in range(STEPS_EACH - 1)]
        visits.append(Visit(position, largest(steps), kept))
    return visits


def rehearsed(shape: FullShape, row: Row, position: int = 0) -> StepMemory:
    """Rehearse steps; of a row that trains one block, with the one at this position."""
    model = row.prepare(shape.model())

    def make(copy: Any) -> Any:
        return next(row.optimizers(copy, (position,)))[1]

    place = [_names(model)[position]] if row.active == 1 else None
    return estimate_memory(model, shape.batch(model), make, active=place)


def _names(model: Any) -> list[str]:
    """The dotted paths of the blocks."""
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in blocks(model)]


def shares(model: Any) -> dict[str, float]:
    """Return the share of all parameters that lies in one block, and outside of all."""
    total = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for p in blocks(model).parameters())
    return {"block": inside / len(blocks(model)) / total, "outside": 1 - inside / total}


Everywhere = Mapping[str, Sequence[StepMemory]]
Visits = Mapping[str, Sequence[Visit]]


def memory_bars(visits: Visits, everywhere: Everywhere, share: Mapping[str, float]) -> list[Bar]:
    """Return what was promised of bytes."""
    full = largest([visit.memory for visit in visits[ADAMW]])
    trained = full.gradients + full.optimizer_state
    bars = []
    for name in (OURS, OFFLOAD, LISA_DROP):
        row = ROWS[name]
        allowed = (row.active or 0) * share["block"] + row.has_outside * share["outside"]
        held = max(v.memory.gradients + v.active_state for v in visits[name]) / trained
        bars.append(Bar(f"{name}: gradients and state, of AdamW's", held, allowed + 0.01))
    for name in (IDLE, CHECKPOINTED):
        worst = max(memory.peak for memory in everywhere[name]) / full.peak
        bars.append(Bar(f"{name}: peak, of AdamW's, worst position", worst, 0.35))
    for name, peer in PEERS.items():
        pairs = zip(everywhere[name], everywhere[peer], strict=True)
        ratio = max(ours.peak / theirs.peak for ours, theirs in pairs)
        bars.append(Bar(f"{name}: peak, of {peer}'s, worst position", ratio, 1.0))
    return bars


def planner_error(visits: Visits, everywhere: Everywhere, full: StepMemory) -> float:
    """Return the largest relative error of a rehearsed peak where it was measured too."""
    pairs = [(full, largest([visit.memory for visit in visits[ADAMW]]))]
    for name, found in everywhere.items():
        pairs += [(found[v.position], v.memory) for v in visits[name] if v.position is not None]
    return max(abs(planned.peak / real.peak - 1) for planned, real in pairs)


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
        _ = rows  # an iterator that is gone closes its optimizer
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_bars(seconds: Mapping[str, float]) -> list[Bar]:
    """Return what was promised of times."""
    return [
        Bar(f"{name}: time, of {peer}'s", seconds[name] / seconds[peer], 1.05)
        for name, peer in PEERS.items()
    ]


def memory_table(visits: Visits) -> str:
    unit = largest([visit.memory for visit in visits[ADAMW]]).peak
    header = ["row", "block active", *(name.replace("_", " ") for name in CATEGORIES)]
    lines = []
    for name, found in visits.items():
        for visit in found:
            place = "" if visit.position is None else str(visit.position)
            sizes = [getattr(visit.memory, category) / MIB for category in CATEGORIES]
            masters = visit.memory.master_weights / MIB
            cells = [f"{size:.0f}" for size in sizes]
            ratio = f"{visit.memory.peak / unit:.3f}"
            lines.append([name, place, *cells, ratio, f"{masters:.0f}"])
    return markdown([*header, "peak of AdamW's", "master weights"], lines)


def everywhere_table(everywhere: Everywhere, full: StepMemory) -> str:
    lines = [
        [name, *(f"{peak / full.peak:.3f}" for peak in _spread([m.peak for m in found]))]
        for name, found in everywhere.items()
    ]
    return markdown(["row", "lowest block", "middle block", "top block", "largest"], lines)


def _spread(values: Sequence[int]) -> tuple[int, ...]:
    return values[0], values[len(values) // 2], values[-1], max(values)


def planned_table(shapes: Sequence[FullShape]) -> str:
    """Rehearse the large shapes; in GiB."""
    header = ["shape", "row", *(name.replace("_", " ") for name in StepMemory.__dataclass_fields__)]
    lines = []
    for shape in shapes:
        for name in LARGE_ROWS:
            _tell(f"{shape.name}: {name}")
            memory = rehearsed(shape, ROWS[name])
            sizes = [f"{size / GIB:,.1f}" for size in astuple(memory)]
            lines.append([shape.name, name, *sizes])
    return markdown(header, lines)


def report(shape: FullShape, *, rounds: int, output: Path) -> list[Bar]:
    """Measure a shape, print its tables, and write its numbers."""
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
    bars = memory_bars(visits, everywhere, shares(shape.model()))
    bars.append(
        Bar("largest error of a rehearsed peak", planner_error(visits, everywhere, full), 0.05)
    )
    _tell(f"{shape.name}: timing")
    seconds = timed(shape, rounds=rounds)
    bars += time_bars(seconds)
    print(f"\n### {shape.name}: {shape.rows} x {shape.length} tokens\n\n{hardware()}\n")
    print("MiB; each row at the blocks visited.\n\n" + memory_table(visits))
    print(f"\nPeak of AdamW's, at {count} positions.\n\n" + everywhere_table(everywhere, full))
    print(f"\nTimes, {shape.rows} x {shape.timed_length} tokens, {rounds} rounds.\n")
    unit = seconds[PACKAGE]
    lines = [[name, f"{s:.3f}", f"{s / unit:.3f}"] for name, s in seconds.items()]
    print(markdown(["row", "seconds", "of the badam package's"], lines))
    print("\n" + markdown(["bar", "value", "limit", ""], [bar.line() for bar in bars]), flush=True)
    output.mkdir(parents=True, exist_ok=True)
    numbers = {
        "hardware": hardware(),
        "measured": {name: [asdict(v) for v in found] for name, found in visits.items()},
        "rehearsed": {name: [asdict(m) for m in found] for name, found in everywhere.items()},
        "seconds": seconds,
        "bars": [bar.line() for bar in bars],
    }
    (output / f"full_{shape.name.replace(' ', '_')}.json").write_text(json.dumps(numbers, indent=2))
    return bars


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--part", choices=["measured", "planned", "both"], default="both")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few rounds")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("runs/full"))
    options = parser.parse_args(arguments)
    shape = ON_CUDA if options.device == "cuda" else SMOLLM2
    rounds = options.rounds
    if options.quick:
        shape, rounds = QUICK, 2
    if options.part != "planned":
        report(shape, rounds=rounds, output=options.output)
    if options.part != "measured":
        print("\n### Rehearsed on the meta device: bfloat16, 1 x 2048 tokens; GiB\n")
        print(planned_table([QUICK] if options.quick else PLANNED), flush=True)


if __name__ == "__main__":  # who calls main() keeps logging and warnings as they are
    warnings.filterwarnings("ignore")  # the badam package's, on float32
    logging.getLogger("dynalora_optim").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    main()
