"""Training steps, measured one by one: time, what the allocator saw, and what was counted.

Peaks are those of forward and backward above what existed before the step, as a `Budget` promises
them; those of whole steps, weights included, stand beside them. On a CPU, which has no such
allocator, the bytes are those counted.
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
    """The most bytes above what was there before: as asked for, and as the allocator rounds it."""

    requested: int = 0
    allocated: int = 0


@contextmanager
def peak_above(device: str) -> Iterator[Peak]:
    """Watch the most bytes in here, above what is there now; zeros on a CPU."""
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
        seconds: Of forward, backward and update.
        peak: Of forward and backward.
        whole: The most bytes allocated in the whole step, weights included.
        predicted: The peak that the optimizer's `Budget` expected; 0 without one.
        switched: Whether other modules are chosen at its end.
        is_first: Whether it is the first one with its choice.
        counted: What was counted; such a step is slow.
    """

    seconds: float
    peak: Peak
    whole: int
    predicted: int
    switched: bool
    is_first: bool
    counted: Counted | None


@dataclass
class Watch:
    """Takes the steps of a run and keeps them.

    Attributes:
        most_counted: So many choices are counted, each when it is met first.
    """

    run: Run
    device: str
    most_counted: int

    def __post_init__(self) -> None:
        self.steps: list[Step] = []
        self.gradient_norm: float | None = None  # of updates within the backward pass: no more
        self.loss = 0.0
        self.reserved = 0
        self._known: set[Choice] = set()

    def take(self, steps: int) -> None:
        """Take so many steps after a warm-up; reserved bytes are read at the end."""
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
                counted = count(self.run.loss, self.run.model)
            else:
                self.run.loss().backward()  # type: ignore[no-untyped-call]
        if counted and self.device != "cuda":
            peak = Peak(counted.peak, counted.peak)
        self.run.update()
        synchronize(self.device)
        seconds = time.perf_counter() - start
        whole = torch.cuda.max_memory_allocated() if self.device == "cuda" else 0
        switched = _mark(self.run) != mark
        self.steps.append(Step(seconds, peak, whole, predicted, switched, is_first, counted))

    def _read_gradients(self) -> None:
        """One more step, for the loss and the norm of all gradients."""
        loss = self.run.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        norms = [
            torch.linalg.vector_norm(p.grad.float())
            for p in self.run.model.parameters()
            if p.grad is not None
        ]
        self.loss = loss.item()
        self.gradient_norm = torch.stack(norms).norm().item() if norms else None
        self.run.update()


def _mark(run: Run) -> object:
    """What changes when other modules are chosen, in ours and in the badam package."""
    record = getattr(run.optimizer, "record", None)
    trains = tuple(name for name, p in run.model.named_parameters() if p.requires_grad)
    return (len(record) if record is not None else 0), trains


def _predicted(run: Run) -> int:
    if run.budget is None:
        return 0
    report: Any = getattr(run.optimizer, "memory_report")  # noqa: B009 - only ours has one
    return int(report().current.peak)


def summary(watch: Watch, tokens: int) -> dict[str, Any]:
    """Return the numbers of a row whose steps have so many tokens."""
    steps = watch.steps
    plain = _plain(steps)
    median = statistics.median(plain)
    counted = [step.counted for step in steps if step.counted]
    forward = statistics.fmean(c.forward for c in counted)
    backward = statistics.fmean(c.backward for c in counted)
    return {
        "tokens_per_s": tokens / median,
        "tokens_per_s_mean": tokens / statistics.fmean(plain),
        "step_s": median,
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


def _plain(steps: Iterable[Step]) -> list[float]:
    """The times of the steps in which nothing but training happens."""
    ordinary = [step for step in steps if not step.counted and not step.switched]
    settled = [step for step in ordinary if not step.is_first]
    return [step.seconds for step in settled or ordinary]


def _switches(steps: Iterable[Step], plain: float) -> dict[str, Any]:
    """What a switch costs: in the step that ends with it, and in the one that follows."""
    steps = list(steps)
    before = [step.seconds - plain for step in steps if step.switched and not step.counted]
    after = [step.seconds - plain for step in steps[1:] if step.is_first and not step.counted]
    if not before:
        return {}
    added = {"switches": sum(step.switched for step in steps)}
    found = {**added, "switch_s": statistics.median(before)}
    return {**found, "first_step_after_s": statistics.median(after)} if after else found


def _budget(watch: Watch) -> dict[str, Any]:
    """Whether each step stayed within its budget, and how far it was from the prediction."""
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
