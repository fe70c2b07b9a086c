"""What all benchmarks share: times side by side, counts of operations, Markdown tables, quiet."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
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


@contextmanager
def quiet(*warned: type[Warning]) -> Iterator[None]:
    """Hold back what the library and transformers log below an error, and these warnings."""
    ours = logging.getLogger("dynalora_optim")
    level, verbosity = ours.level, transformers.logging.get_verbosity()
    ours.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            for category in warned:
                warnings.simplefilter("ignore", category)
            yield
    finally:
        ours.setLevel(level)
        transformers.logging.set_verbosity(verbosity)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
