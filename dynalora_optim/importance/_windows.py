"""Over which passes a score is taken: one window per module group.

A window holds scalars on their device and never waits for it. The windows of a tracker are of one
kind and take in a pass over the model together (`join`), in a few operations rather than in a few
for each module. The tracker copies what all of them hold (`tensors`) to the host at once, and each
turns its values into a score.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from dynalora_optim._base.collectives import average, world_size
from dynalora_optim._base.torch_private import add_all, distances, scale_all


@dataclass(frozen=True)
class Ema:
    """An exponential mean over passes: y <- decay y + (1 - decay) v, begun at the first v.

    Raises:
        ValueError: ``decay`` is not in [0, 1).
    """

    decay: float

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"Ema(decay={self.decay!r}): pass a decay in [0, 1).")


WindowSpec: TypeAlias = "Literal['run', 'period'] | Ema"


class Window(ABC):
    """What one module group has collected."""

    width: ClassVar[int] = 1  # of ``tensors``, once there are any

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.count = 0  # passes collected

    @property
    def is_empty(self) -> bool:
        """Whether no pass was ever collected."""
        return self.count == 0

    def first(self, value: Tensor) -> list[Tensor]:
        """Return ``tensors`` after a first pass."""
        return [value]

    @abstractmethod
    def join(self, columns: Sequence[list[Tensor]], values: list[Tensor]) -> list[list[Tensor]]:
        """Return ``columns`` after one more pass of each of several windows like this one.

        Args:
            columns: Of each of their ``tensors``, those of all windows; on the device of the value.
            values: What each window collects.
        """

    @abstractmethod
    def score(self, values: Sequence[float]) -> float:
        """Return the score, given ``tensors`` as numbers."""

    @abstractmethod
    def roll(self, values: Sequence[float]) -> None:
        """Begin a new period."""

    def state(self, values: Sequence[float]) -> dict[str, Any]:
        """Return the window as plain values, given ``tensors`` as numbers."""
        return {"window": list(values), "count": self.count}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self.tensors = [torch.tensor(value, dtype=torch.float32) for value in state["window"]]
        self.count = state["count"]


class SumWindow(Window):
    """A sum over the run or the period; with ``mean``, divided by the number of passes.

    Gradient measures take the mean: a sum would grow with how often a module was active.
    """

    def __init__(self, *, run: bool, mean: bool) -> None:
        super().__init__()
        self._run = run
        self._mean = mean
        self._closed = 0.0  # in double precision: a long run's sum outgrows float32
        self._closed_count = 0

    @property
    def is_empty(self) -> bool:
        """Whether no pass was ever collected."""
        return self.count + self._closed_count == 0

    def join(self, columns: Sequence[list[Tensor]], values: list[Tensor]) -> list[list[Tensor]]:
        """Add to the open periods' sums."""
        return [add_all(columns[0], values)]

    def score(self, values: Sequence[float]) -> float:
        """Return the sum or mean; an empty period shows the last one."""
        total, count = math.fsum(values), self.count
        if self._run or not count:
            total, count = total + self._closed, count + self._closed_count
        return total / count if self._mean and count else total

    def roll(self, values: Sequence[float]) -> None:
        """Close the period. A sum that is not finite is left out of the run, not kept for ever."""
        total = math.fsum(values)
        if self._run and math.isfinite(total):
            self._closed += total
            self._closed_count += self.count
        elif not self._run and self.count:
            self._closed, self._closed_count = total, self.count
        self.tensors, self.count = [], 0

    def state(self, values: Sequence[float]) -> dict[str, Any]:
        """Return the open and the closed part."""
        closed = {"closed": self._closed, "closed_count": self._closed_count}
        return {**super().state(values), **closed}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        super().load(state)
        self._closed, self._closed_count = state["closed"], state["closed_count"]


class SmoothingWindow(Window):
    """Smoothed pass by pass, whatever the period."""

    def roll(self, values: Sequence[float]) -> None:
        """Go on, unless an inf or nan got in: then begin anew."""
        if not all(map(math.isfinite, values)):
            self.tensors, self.count = [], 0


class EmaWindow(SmoothingWindow):
    """The exponential mean of `Ema`."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self._decay = decay

    def join(self, columns: Sequence[list[Tensor]], values: list[Tensor]) -> list[list[Tensor]]:
        """Return [y]."""
        return [_mean(columns[0], values, self._decay)]

    def score(self, values: Sequence[float]) -> float:
        """Return y."""
        return math.fsum(values)


class SensitivityWindow(SmoothingWindow):
    """AdaLoRA's smoothing, with its uncertainty (arXiv 2303.10512, equations 9 to 11)."""

    width = 2

    def __init__(self, beta1: float, beta2: float) -> None:
        super().__init__()
        self._beta1, self._beta2 = beta1, beta2

    def first(self, value: Tensor) -> list[Tensor]:
        """Return [I, U], begun at zero."""
        zeros = [torch.zeros_like(value)]
        return [column[0] for column in self.join([zeros, zeros], [value])]

    def join(self, columns: Sequence[list[Tensor]], values: list[Tensor]) -> list[list[Tensor]]:
        """Return [I, U]."""
        I = _mean(columns[0], values, self._beta1)  # noqa: E741
        return [I, _mean(columns[1], distances(values, I), self._beta2)]

    def score(self, values: Sequence[float]) -> float:
        """Return I * U."""
        return math.prod(values) if values else 0.0


def _mean(means: list[Tensor], values: list[Tensor], decay: float) -> list[Tensor]:
    """Return decay y + (1 - decay) v for each mean y and value v."""
    return add_all(scale_all(means, decay), values, alpha=1 - decay)


def window_maker(
    spec: WindowSpec | None, *, mean: bool, smoothing: tuple[float, float] | None
) -> Callable[[], Window]:
    """Return what makes the window of one group.

    Args:
        spec: The user's choice; None for the measure's default.
        mean: Whether a sum is divided by the number of passes.
        smoothing: The betas of the measure's own smoothing, if it has one.

    Raises:
        ValueError: ``spec`` is none of the known ones.
    """
    if isinstance(spec, Ema):
        return partial(EmaWindow, spec.decay)
    if spec is None and smoothing is not None:
        return partial(SensitivityWindow, *smoothing)
    if spec not in (None, "run", "period"):
        raise ValueError(f"window={spec!r} must be 'run', 'period' or Ema(decay).")
    return partial(SumWindow, run=spec != "period", mean=mean)


def average_over_ranks(windows: Sequence[Window], device: torch.device) -> None:
    """Replace what the windows hold by its mean over all ranks, without waiting for it."""
    if world_size() == 1 or not windows:
        return
    empty = [torch.zeros(())] * max(window.width for window in windows)
    rows = [(window.tensors or empty)[: window.width] for window in windows]
    flat = torch.stack([scalar.to(device, torch.float32) for row in rows for scalar in row])
    values = iter(average(flat).unbind())
    for window in windows:
        row = [next(values) for _ in range(window.width)]
        if window.tensors:
            window.tensors = row


def to_host(scalars: Sequence[Tensor]) -> list[float]:
    """Read scalars with one copy per device."""
    values = [0.0] * len(scalars)
    by_device: dict[torch.device, list[int]] = {}
    for i, scalar in enumerate(scalars):
        by_device.setdefault(scalar.device, []).append(i)
    for positions in by_device.values():
        together = torch.stack([scalars[i] for i in positions]).tolist()
        for i, value in zip(positions, together, strict=True):
            values[i] = value
    return values


class Passes:
    """Scores of passes that their windows have yet to take in: at most one for each window.

    A window takes in its passes as they came, one after another: when it does so changes no bit.
    """

    def __init__(self) -> None:
        self._waiting: dict[Window, Tensor] = {}

    def add(self, window: Window, score: Tensor) -> None:
        """Have ``window`` collect one pass."""
        if window in self._waiting:
            self.settle()
        self._waiting[window] = score

    @torch.no_grad()
    def settle(self) -> None:
        """Let all windows take in what waits for them, together."""
        waiting, self._waiting = self._waiting, {}
        begun = {window: score for window, score in waiting.items() if window.tensors}
        for window, score in waiting.items():
            window.count += 1
            window.tensors = [t.to(score.device) for t in window.tensors] or window.first(score)
        if begun:
            columns = [list(column) for column in zip(*(w.tensors for w in begun), strict=True)]
            columns = next(iter(begun)).join(columns, list(begun.values()))
            for window, tensors in zip(begun, zip(*columns, strict=True), strict=True):
                window.tensors = list(tensors)

    def forget(self) -> None:
        """Drop what waits."""
        self._waiting = {}
