"""Measure what the wrapper adds to a step with many groups: launches, waits, host time.

There are 24, 144 or 512 groups. Each group is a very small layer, so the rows show the costs that
do not depend on the size of a layer. Each row also measures plain AdamW on the same model. Each
wrapper is a line of `WRAPPERS`.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from _measure import dispatched_ops
from gpu._apart import Row, Values
from gpu._steps import synchronize
from overhead import GROUPS, NEVER, Step, Wrap, chain_step, plain, wrapped
from torch.profiler import ProfilerActivity, profile

DEFAULT = "forward measure"
WRAPPERS: dict[str, Wrap] = {
    "not measured": wrapped("forward", NEVER, period=NEVER),
    DEFAULT: wrapped("forward", period=NEVER),
    "forward measure, 2/3 active": wrapped("forward", active=2 / 3, period=NEVER),
}
TIMES, FEW_TIMES = (20, 4, 2), (6, 2, 1)  # rounds to time, rounds to warm up, steps to count
MANY = 200  # groups; with more, a step is long: fewer steps are enough, and only the default
CALLS = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync")
# In torch's warning about a wait. Another one says once that these warnings are a prototype.
WAIT = "called a synchronizing"


def launches(step: Callable[[], object], repeats: int) -> float:
    """Return the mean number of kernels, copies and fills that a step launches on the GPU."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities):  # the first call starts the profiler
        torch.cuda.synchronize()
    with profile(activities=activities) as seen:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    calls = [event for event in seen.events() or [] if event.name.startswith(CALLS)]
    return len(calls) / repeats


def waits(step: Callable[[], object], repeats: int) -> float:
    """Return how often, on average, a step makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(repeats):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(WAIT in str(w.message) for w in caught) / repeats


def host_seconds(
    steps: dict[str, Step], device: str, rounds: int, warm_up: int
) -> dict[str, tuple[float, float]]:
    """Return two median times for each step: until it is launched, and until it is finished."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(-warm_up, rounds):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            asked = time.perf_counter() - start
            synchronize(device)
            if turn >= 0:
                seconds[name].append((asked, time.perf_counter() - start))
    return {
        name: (statistics.median(a for a, _ in found), statistics.median(d for _, d in found))
        for name, found in seconds.items()
    }


def measured(groups: int, wrapper: str, device: str) -> Values:
    """Measure a wrapper and, for comparison, plain AdamW."""
    steps = {
        "plain": chain_step(groups, plain, device=device),
        "wrapped": chain_step(groups, WRAPPERS[wrapper], device=device),
    }
    values: Values = {}
    rounds, warm_up, repeats = FEW_TIMES if groups > MANY else TIMES
    for name, (asked, done) in host_seconds(steps, device, rounds, warm_up).items():
        values |= {f"{name}_host_ms": asked * 1e3, f"{name}_step_ms": done * 1e3}
    for name, step in steps.items():
        values[f"{name}_ops"] = dispatched_ops(step, repeats=repeats)
        if device == "cuda":
            values[f"{name}_launches"] = launches(step, repeats)
            values[f"{name}_waits"] = waits(step, repeats)
    kinds = ["host_ms", "step_ms", "ops", *(["launches", "waits"] if device == "cuda" else [])]
    added = {f"added_{kind}": values[f"wrapped_{kind}"] - values[f"plain_{kind}"] for kind in kinds}
    return {**values, **added}


def rows(*, dry_run: bool) -> list[Row]:
    """Return all rows."""
    device = "cpu" if dry_run else "cuda"
    return [
        Row(f"{groups} groups: {name}", partial(measured, groups, name, device), seconds=30)
        for groups in ((3, 6) if dry_run else GROUPS)
        for name in ([DEFAULT] if groups > MANY else WRAPPERS)
    ]
