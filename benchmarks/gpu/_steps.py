"""Training steps, measured one by one: time, the memory of CUDA's allocator, and counted memory.

A peak is the largest memory in forward and backward, without what existed before the step; a
`Budget` bounds this peak. The peak of the whole step, including weights, is stored as well. A CPU
has no such allocator, so there the counted bytes are used.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from _count import Counted, count
from _runs import Choice, Run

WARM_UP = 3


@dataclass
class Peak:
    """The peak above what existed before: requested bytes, and bytes that are allocated for it."""

    requested: int = 0
    allocated: int = 0


@contextmanager
def peak_above(device: str) -> Iterator[Peak]:
    """Measure the peak inside this context, above what exists now; 0 on a CPU."""
    peak = Peak()
    if device != "cuda":
        yield peak
        return
    before = torch.cuda.memory_stats_as_nested_dict()  # far faster than memory_stats()
    torch.cuda.reset_peak_memory_stats()
    yield peak
    after = torch.cuda.memory_stats_as_nested_dict()
    for kind in ("requested", "allocated"):
        key = f"{kind}_bytes"
        now = before[key]["all"]["current"] if before else 0
        setattr(peak, kind, after[key]["all"]["peak"] - now)


def synchronize(device: str) -> None:
    """Wait for the GPU, if it is one."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Step:
    """One step.

    Attributes:
        seconds: Time of forward, backward and update.
        host: Time until all of it was launched. About as long as ``seconds``: the host is what
            takes the time.
        peak: Peak of forward and backward.
        whole: Peak of the allocated bytes in the whole step, including weights.
        predicted: The peak that the optimizer's `Budget` predicts; 0 without a budget.
        switched: Whether other modules are chosen at the end of the step.
        is_first: Whether it is the first step with its choice.
        counted: The counts, if the step was counted. Counted steps are slow.
    """

    seconds: float
    host: float
    peak: Peak
    whole: int
    predicted: int
    switched: bool
    is_first: bool
    counted: Counted | None


@dataclass
class Watch:
    """Takes the steps of a run and stores their measurements.

    Attributes:
        most_counted: The largest number of choices to count. A choice is counted in its first step.
    """

    run: Run
    device: str
    most_counted: int

    def __post_init__(self) -> None:
        self.steps: list[Step] = []
        self.gradient_norm: float | None = None  # None if fused updates have freed the gradients
        self.loss = 0.0
        self.reserved = 0
        self._known: set[Choice] = set()

    def take(self, steps: int) -> None:
        """Take ``steps`` steps after a warm-up. Reserved bytes are read at the end."""
        for _ in range(WARM_UP):
            self.run.step()
        for _ in range(steps):
            self._take_one()
        if self.device == "cuda":
            self.reserved = torch.cuda.max_memory_reserved()
        self._read_gradients()

    def _take_one(self) -> None:
        is_first = not self.steps or self.steps[-1].switched
        choice, mark = self.run.choice(), _mark(self.run)
        is_new = is_first and choice not in self._known and len(self._known) < self.most_counted
        predicted = _predicted(self.run)
        synchronize(self.device)
        start = time.perf_counter()
        counted = None
        with peak_above(self.device) as peak:
            if is_new:
                self._known.add(choice)
                counted = count(self.run.loss)
            else:
                self.run.loss().backward()  # type: ignore[no-untyped-call]
        if counted and self.device != "cuda":
            peak = Peak(counted.peak, counted.peak)
        self.run.update()
        host = time.perf_counter() - start
        synchronize(self.device)
        seconds = time.perf_counter() - start
        whole = torch.cuda.max_memory_allocated() if self.device == "cuda" else 0
        switched = _mark(self.run) != mark
        self.steps.append(Step(seconds, host, peak, whole, predicted, switched, is_first, counted))

    def _read_gradients(self) -> None:
        """Take one more step, to get the loss and the norm of all gradients."""
        loss = self.run.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        norms = [
            torch.linalg.vector_norm(p.grad).float()
            for p in self.run.model.parameters()
            if p.grad is not None
        ]
        self.loss = loss.item()
        self.gradient_norm = torch.stack(norms).norm().item() if norms else None
        self.run.update()


def _mark(run: Run) -> object:
    """Return a value that changes when other modules are chosen (ours, or the badam package)."""
    record = getattr(run.optimizer, "record", None)
    trains = tuple(name for name, p in run.model.named_parameters() if p.requires_grad)
    return (len(record) if record is not None else 0), trains


def _predicted(run: Run) -> int:
    if run.budget is None:
        return 0
    report: Any = getattr(run.optimizer, "memory_report")  # noqa: B009 - only ours has one
    return int(report().current.peak)


def summary(watch: Watch, tokens: int) -> dict[str, Any]:
    """Return the numbers of a row whose steps have ``tokens`` tokens each."""
    steps = watch.steps
    ordinary = _ordinary(steps)
    plain = [step.seconds for step in ordinary]
    median = statistics.median(plain)
    counted = [step.counted for step in steps if step.counted]
    forward = statistics.fmean(c.forward for c in counted)
    backward = statistics.fmean(c.backward for c in counted)
    return {
        "tokens_per_s": tokens / median,
        "tokens_per_s_mean": tokens / statistics.fmean(plain),
        "step_s": median,
        "host_s": statistics.median(step.host for step in ordinary),
        "steps_timed": len(plain),
        "peak_above": max(step.peak.allocated for step in steps),
        "peak_above_requested": max(step.peak.requested for step in steps),
        "peak_above_counted": max(c.peak for c in counted),
        "peak_allocated": max(step.whole for step in steps),
        "peak_reserved": watch.reserved,
        "forward_flops": forward,
        "backward_flops": backward,
        "tflop_per_s": (forward + backward) / statistics.fmean(plain) / 1e12,
        "gradient_norm": watch.gradient_norm,
        "loss": watch.loss,
        **_switches(steps, median),
        **_budget(watch),
    }


def _ordinary(steps: Iterable[Step]) -> list[Step]:
    """Return the steps without counting and without a switch."""
    ordinary = [step for step in steps if not step.counted and not step.switched]
    return [step for step in ordinary if not step.is_first] or ordinary


def _switches(steps: Iterable[Step], plain: float) -> dict[str, Any]:
    """Return the time that a switch adds: to the step that ends with it, and to the next one."""
    steps = list(steps)
    before = [step.seconds - plain for step in steps if step.switched and not step.counted]
    after = [step.seconds - plain for step in steps[1:] if step.is_first and not step.counted]
    if not before:
        return {}
    added = {"switches": sum(step.switched for step in steps)}
    found = {**added, "switch_s": statistics.median(before)}
    return {**found, "first_step_after_s": statistics.median(after)} if after else found


def _budget(watch: Watch) -> dict[str, Any]:
    """Return how many steps exceeded the budget, and the errors of the predictions."""
    budget, costs = watch.run.budget, None
    if budget is not None:
        costs = budget.contexts[-1].costs
    if budget is None or costs is None:
        return {}
    limit = budget.limit(costs)
    seen = [step for step in watch.steps if step.peak.requested]
    errors = [step.peak.requested / step.predicted - 1 for step in seen]
    return {
        "limit": limit,
        "predicted_largest": max(step.predicted for step in seen),
        "largest_error": max(errors, key=abs),
        "steps_beyond": sum(step.peak.requested > limit for step in seen),
        "steps_beyond_allocated": sum(step.peak.allocated > limit for step in seen),
        "largest_of_limit": max(step.peak.requested for step in seen) / limit,
    }
