"""What all benchmarks share: times side by side, counts of operations, and Markdown tables."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], object]


def median_seconds(
    steps: Mapping[str, Step],
    *,
    rounds: int,
    warm_up: int = 3,
    every: Mapping[str, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Time each step once a round, all side by side, and return the medians.

    The order turns from round to round, so that none is always the one after a slow one. A step
    named in ``every`` is taken in every so many rounds only.
    """
    every = every or {}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(-warm_up, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn >= 0 and turn % every.get(name, 1):
                continue
            synchronize()
            start = clock()
            steps[name]()
            synchronize()
            if turn >= 0:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize() -> None:
    """Wait for the device, if there is one besides the CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.count += 1
        return func(*args, **(kwargs or {}))


def dispatched_ops(step: Step, *, repeats: int = 1) -> float:
    """Count the operations that a step dispatches, forward, backward and update: the mean."""
    counter = _Counter()  # type: ignore[no-untyped-call]
    with counter:
        for _ in range(repeats):
            step()
    return counter.count / repeats


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def hardware() -> str:
    """Name the machine and the versions, for the line above a table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    threads = torch.get_num_threads()
    return f"{device}, {os.cpu_count()} CPU cores ({threads} threads), torch {torch.__version__}"
