"""Make the tables of `full_parameter.py` from its stored rows.

Each row has a *kind*: "measured" (steps at one position), "rehearsed" (an estimate for one
position), "timed", or "shape" (the shares of the parameters inside and outside the blocks).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from _bars import Bar
from _full_rows import (
    ADAMW,
    CHECKPOINTED,
    IDLE,
    LISA_DROP,
    OFFLOAD,
    OURS,
    PACKAGE,
    PACKAGE_CHECKPOINTED,
    ROWS,
)
from _measure import markdown
from _stored import Row, described

from dynalora_optim import StepMemory

MIB, GIB = 2**20, 2**30
PEERS = {OURS: PACKAGE, CHECKPOINTED: PACKAGE_CHECKPOINTED}  # rows to compare with each other
CATEGORIES = [name for name in StepMemory.__dataclass_fields__ if name != "master_weights"]


@dataclass(frozen=True)
class Visit:
    """The largest memory of the steps at one position. ``active_state``: state of active groups."""

    position: int | None
    memory: StepMemory
    active_state: int


def largest(found: Sequence[StepMemory]) -> StepMemory:
    """Return the largest of each category."""
    return StepMemory(*map(max, zip(*map(astuple, found), strict=True)))


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        visits: The measurements, by row.
        full: The estimate for a step of AdamW.
        everywhere: The estimates for each position in order, by row.
        share: The share of the parameters in one block, and outside of all blocks.
        seconds: The time of a step, by row.
    """

    visits: Mapping[str, Sequence[Visit]]
    full: StepMemory
    everywhere: Mapping[str, Sequence[StepMemory]]
    share: Mapping[str, float]
    seconds: Mapping[str, float]

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the rows to store."""
        rows: list[dict[str, Any]] = [{"row": "shares", "kind": "shape", **self.share}]
        for name, found in self.visits.items():
            rows += [{"row": name, "kind": "measured", **asdict(visit)} for visit in found]
        rehearsed = {ADAMW: [self.full], **self.everywhere}
        for name, memories in rehearsed.items():
            for position, memory in enumerate(memories):
                row = {"row": name, "kind": "rehearsed", "position": position}
                rows.append(row | {"memory": asdict(memory)})
        for name, seconds in self.seconds.items():
            rows.append({"row": name, "kind": "timed", "seconds": seconds})
        return rows

    @classmethod
    def of_rows(cls, rows: Sequence[Row]) -> Measured:
        """Build it from stored rows."""
        visits, everywhere = defaultdict(list), defaultdict(list)
        for row in rows:
            if row["kind"] == "measured":
                memory = StepMemory(**row["memory"])
                visits[row["row"]].append(Visit(row["position"], memory, row["active_state"]))
            elif row["kind"] == "rehearsed":
                everywhere[row["row"]].append(StepMemory(**row["memory"]))
        (full,) = everywhere.pop(ADAMW)
        share = next({k: row[k] for k in ("block", "outside")} for row in rows if "block" in row)
        seconds = {row["row"]: row["seconds"] for row in rows if row["kind"] == "timed"}
        return cls(visits, full, everywhere, share, seconds)


def bars(found: Measured) -> list[Bar]:
    error = Bar("largest error of a rehearsed peak", planner_error(found), 0.05)
    return [*_memory_bars(found), error, *_time_bars(found.seconds)]


def _memory_bars(found: Measured) -> list[Bar]:
    full = largest([visit.memory for visit in found.visits[ADAMW]])
    trained = full.gradients + full.optimizer_state
    bars = []
    for name in (OURS, OFFLOAD, LISA_DROP):
        row = ROWS[name]
        inside = (row.active or 0) * found.share["block"]
        allowed = inside + row.has_outside * found.share["outside"]
        held = max(v.memory.gradients + v.active_state for v in found.visits[name]) / trained
        bars.append(Bar(f"{name}: gradients and state / AdamW", held, allowed + 0.01))
    for name in (IDLE, CHECKPOINTED):
        worst = max(memory.peak for memory in found.everywhere[name]) / full.peak
        bars.append(Bar(f"{name}: peak / AdamW, worst position", worst, 0.35))
    for name, peer in PEERS.items():
        pairs = zip(found.everywhere[name], found.everywhere[peer], strict=True)
        ratio = max(ours.peak / theirs.peak for ours, theirs in pairs)
        bars.append(Bar(f"{name}: peak / {peer}, worst position", ratio, 1.0))
    return bars


def planner_error(found: Measured) -> float:
    """Return the largest relative error of an estimated peak, over all that were measured too."""
    pairs = [(found.full, largest([visit.memory for visit in found.visits[ADAMW]]))]
    for name, planned in found.everywhere.items():
        visits = (v for v in found.visits[name] if v.position is not None)
        pairs += [(planned[v.position], v.memory) for v in visits]  # type: ignore[index]
    return max(abs(planned.peak / real.peak - 1) for planned, real in pairs)


def _time_bars(seconds: Mapping[str, float]) -> list[Bar]:
    return [
        Bar(f"{name}: time / {peer}", seconds[name] / seconds[peer], 1.05)
        for name, peer in PEERS.items()
    ]


def memory_table(rows: Sequence[Row]) -> str:
    """Return the table of the measurements, in MiB."""
    visits = Measured.of_rows(rows).visits
    unit = largest([visit.memory for visit in visits[ADAMW]]).peak
    header = ["row", "block active", *(name.replace("_", " ") for name in CATEGORIES)]
    lines = []
    for name, found in visits.items():
        for visit in found:
            place = "" if visit.position is None else str(visit.position)
            sizes = [getattr(visit.memory, category) / MIB for category in CATEGORIES]
            cells = [f"{size:.0f}" for size in sizes]
            masters = f"{visit.memory.master_weights / MIB:.0f}"
            lines.append([name, place, *cells, f"{visit.memory.peak / unit:.3f}", masters])
    table = markdown([*header, "peak / AdamW's peak", "master weights"], lines)
    return f"{described(rows, 'transformers', 'peft', 'badam')}\nIn MiB:\n\n{table}"


def everywhere_table(rows: Sequence[Row]) -> str:
    """Return the table of peaks at the lowest, middle and top block, and the largest peak."""
    found = Measured.of_rows(rows)
    lines = []
    for name, memories in found.everywhere.items():
        peaks = [memory.peak / found.full.peak for memory in memories]
        shown = (peaks[0], peaks[len(peaks) // 2], peaks[-1], max(peaks))
        lines.append([name, *(f"{peak:.3f}" for peak in shown)])
    return markdown(["row", "lowest block", "middle block", "top block", "largest"], lines)


def times_table(rows: Sequence[Row]) -> str:
    seconds = Measured.of_rows(rows).seconds
    lines = [[name, f"{s:.3f}", f"{s / seconds[PACKAGE]:.3f}"] for name, s in seconds.items()]
    return markdown(["row", "seconds", "ratio to the badam package"], lines)


def bars_table(rows: Sequence[Row]) -> str:
    lines = [bar.line() for bar in bars(Measured.of_rows(rows))]
    return markdown(["target", "value", "limit", ""], lines)


def planned_table(rows: Sequence[Row]) -> str:
    """Return the table of the estimates for the large shapes, in GiB."""
    header = ["shape", "row", *(name.replace("_", " ") for name in StepMemory.__dataclass_fields__)]
    lines = []
    for row in rows:
        sizes = [f"{size / GIB:,.1f}" for size in astuple(StepMemory(**row["memory"]))]
        lines.append([row["shape"], row["row"], *sizes])
    return f"{described(rows, 'transformers', 'peft')}\nIn GiB:\n\n{markdown(header, lines)}"
