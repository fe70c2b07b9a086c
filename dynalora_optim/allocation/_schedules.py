"""When to reallocate (section 3.3 of the paper), by the number of optimizer steps.

A schedule is any object with ``due(step) -> bool``. It is called once after each optimizer step
with the number of steps done so far. Gradient accumulation, evaluation, and a step that a
``GradScaler`` skips do not count. The first selection, at step 0, is always made. If the schedule
has an attribute ``warmup``, all modules are active during the first ``warmup`` steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dynalora_optim._base.checks import whole_number


@runtime_checkable
class Schedule(Protocol):
    """Decides after which optimizer steps the active modules are chosen again."""

    def due(self, step: int) -> bool:
        """Return whether to reallocate now that ``step`` (>= 1) optimizer steps are done.

        All ranks that train together must return the same. At each step the results of a schedule
        of your own are compared between ranks, which waits for the device. The schedules of this
        package are not compared.
        """
        ...


@dataclass(frozen=True)
class Periodic:
    """Reallocate after every ``n`` optimizer steps.

    Attributes:
        n: Optimizer steps between two selections.
        warmup: The number of steps at the start in which all modules are active; then the first
            choice is made.

    Raises:
        ValueError: ``n`` is not a whole number >= 1, or ``warmup`` is not one >= 0.
    """

    n: int
    warmup: int = 0

    def __post_init__(self) -> None:
        whole_number("period", self.n, least=1)
        whole_number("warmup", self.warmup, least=0)

    def due(self, step: int) -> bool:
        """Return whether ``step`` is the end of the warm-up, or a multiple of ``n`` after it."""
        return step >= self.warmup and (step - self.warmup) % self.n == 0


@dataclass(frozen=True)
class Once:
    """Select at the start and once more after ``at`` optimizer steps (the paper's alpha).

    Attributes:
        at: Optimizer steps from the first choice to the second.
        warmup: The number of steps at the start in which all modules are active; then the first
            choice is made.

    Raises:
        ValueError: ``at`` is not a whole number >= 1, or ``warmup`` is not one >= 0.
    """

    at: int
    warmup: int = 0

    def __post_init__(self) -> None:
        whole_number("Once(at)", self.at, least=1)
        whole_number("warmup", self.warmup, least=0)

    def due(self, step: int) -> bool:
        """Return whether ``step`` is the end of the warm-up, or ``at`` steps after it."""
        return step in (self.warmup, self.warmup + self.at)


def warmup_of(schedule: Schedule) -> int:
    """Return the number of steps at the start in which all modules are active.

    Raises:
        ValueError: ``warmup`` of a user's own schedule is not a whole number >= 0.
    """
    warmup = getattr(schedule, "warmup", 0)
    whole_number("warmup", warmup, least=0)
    return int(warmup)


def is_function_of_step(schedule: Schedule) -> bool:
    """Return whether ``schedule`` is one of this file's, which depend only on the step."""
    return isinstance(schedule, (Periodic, Once))


def as_schedule(period: int | Schedule) -> Schedule:
    """Return ``period`` as a schedule; a whole number stands for `Periodic`.

    Raises:
        ValueError: ``period`` is a number, but not a whole number >= 1.
        TypeError: ``period`` is neither a number nor an object with ``due``.
    """
    if isinstance(period, Schedule):
        return period
    if isinstance(period, (int, float)):
        return Periodic(period)  # Periodic refuses a float
    raise TypeError(
        f"period={period!r} is neither a number of steps nor a schedule; pass a positive int, "
        "Once(at), or an object with due(step) -> bool."
    )
