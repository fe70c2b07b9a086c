"""The targets of the memory benchmark: limits that the measured numbers are compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from _chunked_rows import CHUNKED_FRONT, IN_CHUNKS, chunked_name
from _fronts import Point, worst_point, worst_ratio
from _rows import ALL_ACTIVE, PEER_FRONT, UNWRAPPED, budget_name


@dataclass
class Result:
    """The numbers of one row. Ratios are ratios to peft LoRA.

    Attributes:
        peak: The largest peak over the choices, as a ratio.
        peak_mean: The mean peak, as a ratio.
        saved: The largest number of saved bytes, as a ratio.
        saved_mean: The mean number of saved bytes, as a ratio.
        forward: Mean FLOPs of the forward pass, as a ratio.
        backward: Mean FLOPs of the backward pass, as a ratio.
        flops: Mean FLOPs of both passes, as a ratio.
        ops: Mean number of dispatched operations.
        added: Operations that the frozen model without adapters does not have, as a ratio.
        time: Time of a step, as a ratio; nan if nothing was timed.
        draws: Number of choices counted.
        distinct: Number of different choices among them.
        tokens: Tokens per second.
        resident: Peak resident bytes above the weights, measured in a separate process, or None. On
            a GPU: the largest peak, in bytes, that CUDA's allocator reports.
        idle: Modules that no choice made active; None if not known.
        least_probability: The smallest probability of being active, over all modules and choices.
    """

    peak: float
    peak_mean: float
    saved: float
    saved_mean: float
    forward: float
    backward: float
    flops: float
    ops: float
    added: float
    time: float
    draws: int
    distinct: int
    tokens: float = 0.0
    resident: int | None = None
    idle: list[str] | None = None
    least_probability: float | None = None


@dataclass(frozen=True)
class Bar:
    """A value and its limit: a target.

    A value that must not exceed its limit is rounded to three decimals, as it is printed, before it
    is compared. A value that must exceed its limit (``above``) is not rounded.
    """

    name: str
    value: float
    limit: float
    above: bool = False

    @property
    def is_met(self) -> bool:
        if self.above:
            return self.value > self.limit
        return round(self.value, 3) <= round(self.limit, 3)

    def line(self) -> list[str]:
        sign, verdict = ">" if self.above else "<=", "ok" if self.is_met else "MISSED"
        value = f"{self.value:.5f}" if self.above else f"{self.value:.3f}"
        return [self.name, value, f"{sign} {self.limit:.3f}", verdict]


def bars(results: Mapping[str, Result], slack: float) -> list[Bar]:
    """Return the targets for which all rows were measured."""
    if any(name.endswith(IN_CHUNKS) for name in results):
        found = [*_in_chunks(results), *_fronts(results, "flops")]
    else:
        found = [*_all_active(results), *_budgets(results), *_fronts(results, "backward")]
    found = [bar for bar in found if not math.isnan(bar.value)]
    return [
        Bar(bar.name, bar.value, bar.limit + slack, bar.above) if bar.limit else bar
        for bar in found
    ]


def _all_active(results: Mapping[str, Result]) -> Iterator[Bar]:
    row = results.get(ALL_ACTIVE)
    if row:
        yield Bar("all active: peak", row.peak, 1.0)
        yield Bar("all active: saved", row.saved, 1.0)
        yield Bar("all active: operations that the adapters add", row.added, 0.5)
        yield Bar("all active: median time", row.time, 0.95)
    if UNWRAPPED in results:
        added = results[UNWRAPPED].added
        yield Bar("the same without the wrapper: operations that the adapters add", added, 0.5)


_LIMITS = {  # budget -> (backward FLOPs, median time)
    (0.75, 1.0): (1.02, None),
    (0.40, 1.0): (1.02, 1.0),
    (0.40, 0.6): (0.62, 0.85),
    (0.175, 1.0): (1.02, None),
}


def _budgets(results: Mapping[str, Result]) -> Iterator[Bar]:
    for (memory, compute), (backward, time) in _LIMITS.items():
        name = budget_name(memory, compute)
        row = results.get(name)
        if not row:
            continue
        yield Bar(f"{name}: largest peak", row.peak, memory)
        yield Bar(f"{name}: mean backward FLOPs", row.backward, backward)
        if time is not None:
            yield Bar(f"{name}: median time", row.time, time)
        if memory == 0.40:
            assert row.least_probability is not None
            assert row.idle is not None
            chance = row.least_probability
            yield Bar(f"{name}: modules never active in {row.draws}", len(row.idle), 0)
            yield Bar(f"{name}: least probability of a module", chance, 0, above=True)


_CHUNKED_LIMITS = {  # row -> (peak, FLOPs of both passes, median time)
    f"{ALL_ACTIVE}{IN_CHUNKS}": (0.65, 1.0, 1.0),
    chunked_name(0.15, 0.6): (0.15, None, 0.80),
    chunked_name(0.07, 1.0): (0.07, 1.0, 0.85),
}


def _in_chunks(results: Mapping[str, Result]) -> Iterator[Bar]:
    for name, limits in _CHUNKED_LIMITS.items():
        row = results.get(name)
        if row:
            values = {"largest peak": row.peak, "mean FLOPs": row.flops, "median time": row.time}
            for (what, value), limit in zip(values.items(), limits, strict=True):
                if limit is not None:
                    yield Bar(f"{name}: {what}", value, limit)


def _fronts(results: Mapping[str, Result], flops: str) -> Iterator[Bar]:
    """Compare our rows with the strongest peers. ``flops``: which FLOPs are the cost."""
    front, end = (CHUNKED_FRONT, IN_CHUNKS) if flops == "flops" else (PEER_FRONT, "")
    if not {*front, f"{ALL_ACTIVE}{end}"} <= results.keys():
        return
    names = [name for name in results if name.startswith("ours") and name.endswith(end)]
    rows = [[results[name] for name in part] for part in (names, front)]
    least, limit = (min(row.peak for row in part) for part in rows)
    yield Bar("front: our smallest peak", least, limit)
    for cost in (flops, "time"):
        ours, peers = ([point(row, cost) for row in part] for part in rows)
        what = {"backward": "mean backward FLOPs", "flops": "mean FLOPs"}.get(cost, "median time")
        yield Bar(f"front, {what}: worst ratio at equal memory", worst_ratio(ours, peers), 1.0)
        yield Bar(f"front, {what}: our worst point", worst_point(ours, peers), 1.0)


def point(row: Result, cost: str) -> Point:
    return row.peak, getattr(row, cost)
