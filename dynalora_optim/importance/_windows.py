"""Windows: each holds the score of one module group, taken over the run, a period, or a mean.

A window holds scalars on their device and never waits for the device. All windows of a tracker are
of one class, and add the scores of one pass over the model together (`join`). This takes a few
operations in total, rather than a few for each module. The tracker copies the `tensors` of all
windows to the host at once, and each window turns its values into a score.
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
from torch.func import debug_unwrap

from dynalora_optim._base.torch_private import add_all, distances, scale_all


@dataclass(frozen=True)
class Ema:
    """An exponential mean over passes: y <- decay y + (1 - decay) v, starting at the first v.

    Raises:
        ValueError: ``decay`` is not in [0, 1).
    """

    decay: float

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"Ema(decay={self.decay!r}): pass a decay in [0, 1).")


WindowSpec: TypeAlias = "Literal['run', 'period'] | Ema"


class Window(ABC):
    """The scores that one module group has collected."""

    width: ClassVar[int] = 1  # the length of ``tensors`` after the first pass

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.count = 0  # passes collected
        self.skipped = False  # whether a pass with gradients was left out, in evaluation mode
        self.unshared = 0  # of these, passes that this rank has not yet shared with the others
        self.shared_count: Tensor | None = None  # passes of all ranks, in the mean; on their device

    @property
    def is_empty(self) -> bool:
        """Whether no pass was ever collected."""
        return self.count == 0

    def first(self, value: Tensor) -> list[Tensor]:
        """Return ``tensors`` after a first pass of score ``value``."""
        return [value]

    def if_begun(self, joined: list[Tensor], value: Tensor) -> list[Tensor]:
        """Return ``joined``; or what a first pass gives, if no rank has collected one so far."""
        if self.count or self.shared_count is None:
            return joined
        is_begun = self.shared_count.to(value.device) > 0
        first = self.first(value)
        return [torch.where(is_begun, j, f) for j, f in zip(joined, first, strict=True)]

    @abstractmethod
    def join(self, columns: Sequence[list[Tensor]], values: list[Tensor]) -> list[list[Tensor]]:
        """Return ``columns`` after one more pass of each of several windows like this one.

        Args:
            columns: For each position in ``tensors``, the tensors of all windows, on the device of
                the values.
            values: The score that each window adds.
        """

    @abstractmethod
    def score(self, values: Sequence[float]) -> float:
        """Return the score, given ``tensors`` as numbers."""

    @abstractmethod
    def roll(self, values: Sequence[float]) -> None:
        """Begin a new period."""

    def empty(self) -> None:
        """Forget all passes that are not closed."""
        self.tensors, self.count, self.unshared, self.shared_count = [], 0, 0, None

    def state(self, values: Sequence[float]) -> dict[str, Any]:
        """Return the window as plain values, given ``tensors`` as numbers."""
        return {"window": list(values), "count": self.count}

    def load(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned."""
        self.tensors = [torch.tensor(value, dtype=torch.float32) for value in state["window"]]
        self.count, self.unshared, self.shared_count = state["count"], 0, None


class SumWindow(Window):
    """A sum over the run or the period; with ``mean``, divided by the number of passes.

    Gradient measures take the mean: a sum would grow with how often a module was active.
    """

    def __init__(self, *, run: bool, mean: bool) -> None:
        super().__init__()
        self._run = run
        self._mean = mean
        self._closed = 0.0  # in double precision: float32 is too coarse for the sum of a long run
        self._closed_count = 0

    @property
    def is_empty(self) -> bool:
        """Whether no pass was ever collected."""
        return self.count + self._closed_count == 0

    def join(self, columns: Sequence[list[Tensor]], values: list[Tensor]) -> list[list[Tensor]]:
        """Add to the sums of the current period."""
        return [add_all(columns[0], values)]

    def score(self, values: Sequence[float]) -> float:
        """Return the sum or mean; while the current period is empty, that of the last one."""
        total, count = math.fsum(values), self.count
        if self._run or not count:
            total, count = total + self._closed, count + self._closed_count
        return total / count if self._mean and count else total

    def roll(self, values: Sequence[float]) -> None:
        """Close the period; a sum that is not finite is not added to that of the run."""
        total = math.fsum(values)
        if self._run and math.isfinite(total):
            self._closed += total
            self._closed_count += self.count
        elif not self._run and self.count:
            self._closed, self._closed_count = total, self.count
        self.empty()

    def state(self, values: Sequence[float]) -> dict[str, Any]:
        """Return the values of the current period and of the closed ones."""
        closed = {"closed": self._closed, "closed_count": self._closed_count}
        return {**super().state(values), **closed}

    def load(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned."""
        super().load(state)
        self._closed, self._closed_count = state["closed"], state["closed_count"]


class SmoothingWindow(Window):
    """A window that is smoothed at each pass, and does not depend on periods."""

    def roll(self, values: Sequence[float]) -> None:
        """Keep the values; if one is inf or nan, start again without any."""
        if not all(map(math.isfinite, values)):
            self.empty()


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
        """Return [I, U] after one pass, starting from zero."""
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
    """Return a function that makes the window of one group.

    Args:
        spec: The user's choice; None for the measure's default.
        mean: Whether a sum is divided by the number of passes.
        smoothing: The betas of the measure's own smoothing, if it has one.

    Raises:
        ValueError: ``spec`` is unknown.
    """
    if isinstance(spec, Ema):
        return partial(EmaWindow, spec.decay)
    if spec is None and smoothing is not None:
        return partial(SensitivityWindow, *smoothing)
    if spec not in (None, "run", "period"):
        raise ValueError(f"window={spec!r} must be 'run', 'period' or Ema(decay).")
    return partial(SumWindow, run=spec != "period", mean=mean)


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
    """Scores of passes that are not yet added to their windows: at most one for each window.

    A window adds its scores in the order of the passes, so that it makes no difference, to the bit,
    when they are added.
    """

    def __init__(self) -> None:
        self._waiting: dict[Window, Tensor] = {}

    def add(self, window: Window, score: Tensor) -> None:
        """Store the score of one pass of ``window``; a score that is waiting is added first."""
        if window in self._waiting:
            self.settle()
        value = debug_unwrap(score)
        # Under torch.vmap: the scores of all passes that it stands for.
        self._waiting[window] = value if value is score else debug_unwrap(value.sum())

    @torch.no_grad()
    def settle(self) -> None:
        """Add all waiting scores to their windows, together."""
        waiting, self._waiting = self._waiting, {}
        begun = {window: score for window, score in waiting.items() if window.tensors}
        for window, score in waiting.items():
            window.tensors = [t.to(score.device) for t in window.tensors] or window.first(score)
        if begun:
            columns = [list(column) for column in zip(*(w.tensors for w in begun), strict=True)]
            columns = next(iter(begun)).join(columns, list(begun.values()))
            for window, tensors in zip(begun, zip(*columns, strict=True), strict=True):
                window.tensors = window.if_begun(list(tensors), begun[window])
        for window in waiting:
            # What is computed within a transform of torch.func is of no use after it.
            window.tensors = list(map(debug_unwrap, window.tensors))
            window.count += 1
            window.unshared += 1

    def forget(self) -> None:
        """Delete the waiting scores."""
        self._waiting = {}
