"""What all benchmarks share: timing, counting operations, Markdown tables, less output."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], object]
Kept = Callable[[str, int, Callable[[], float]], float]


def median_seconds(
    steps: Mapping[str, Step],
    *,
    rounds: int,
    warm_up: int = 3,
    every: Mapping[str, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    kept: Kept | None = None,
) -> dict[str, float]:
    """Time each step once per round, and return the median time of each.

    The order changes from round to round, so that no step always follows the same slow step. For a
    step in ``every``, the value n means that it is timed only in every n-th round. ``kept`` may
    return the time of a step in a round from an earlier run; else it calls what it is given.
    """
    every = every or {}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(-warm_up, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn >= 0 and turn % every.get(name, 1):
                continue
            timed = partial(_seconds, steps[name], clock)
            if turn < 0:
                timed()
            else:
                seconds[name].append(kept(name, turn, timed) if kept else timed())
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds(step: Step, clock: Callable[[], float]) -> float:
    synchronize()
    start = clock()
    step()
    synchronize()
    return clock() - start


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
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
    """Return the mean number of operations that a step dispatches (forward, backward, update)."""
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
    """Hide log messages below errors of the library and of transformers, and these warnings."""
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
    """Let torch use ``count`` threads, and restore the former number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
