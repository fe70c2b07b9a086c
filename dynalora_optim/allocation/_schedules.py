"""When to reallocate (section 3.3 of the paper). The clock counts optimizer steps and nothing else.

A schedule is any object with ``due(step) -> bool``. It is asked once after each optimizer step with
the number of steps done so far, so neither gradient accumulation, nor evaluation, nor a step that a
``GradScaler`` skipped moves it. The first selection, at step 0, is made whatever it answers. While
fewer than ``warmup`` steps are done, if the schedule has such a number, a selection takes all
modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dynalora_optim._base.checks import whole_number


@runtime_checkable
class Schedule(Protocol):
    """Decides after which optimizer steps the active set is chosen anew."""

    def due(self, step: int) -> bool:
        """Return whether to reallocate now that ``step`` (>= 1) optimizer steps are done.

        Ranks that train together must all return the same. One of your own is compared between them
        at each step, which waits for the device; those here need no comparison.
        """
        ...


@dataclass(frozen=True)
class Periodic:
    """Reallocate after every ``n`` optimizer steps.

    Attributes:
        n: Optimizer steps between two selections.
        warmup: All modules are active for so many steps first; then the first choice is made.

    Raises:
        ValueError: ``n`` is not a positive whole number, or ``warmup`` a negative one.
    """

    n: int
    warmup: int = 0

    def __post_init__(self) -> None:
        whole_number("period", self.n, least=1)
        whole_number("warmup", self.warmup, least=0)

    def due(self, step: int) -> bool:
        """Return whether ``step``, from the end of the warm-up on, is a multiple of ``n``."""
        return step >= self.warmup and (step - self.warmup) % self.n == 0


@dataclass(frozen=True)
class Once:
    """Select at the beginning and once more after ``at`` optimizer steps (the paper's alpha).

    Attributes:
        at: Optimizer steps from the first choice to the second.
        warmup: All modules are active for so many steps first; then the first choice is made.

    Raises:
        ValueError: ``at`` is not a positive whole number, or ``warmup`` a negative one.
    """

    at: int
    warmup: int = 0

    def __post_init__(self) -> None:
        whole_number("Once(at)", self.at, least=1)
        whole_number("warmup", self.warmup, least=0)

    def due(self, step: int) -> bool:
        """Return whether ``step`` ends the warm-up, or comes ``at`` steps after it."""
        return step in (self.warmup, self.warmup + self.at)


@dataclass(frozen=True)
class Never:
    """Do not reallocate."""

    def due(self, step: int) -> bool:
        """Return False."""
        return False


def warmup_of(schedule: Schedule) -> int:
    """Return during how many steps at the start all modules are active.

    Raises:
        ValueError: ``warmup`` of a schedule of the user's own is no whole number.
    """
    warmup = getattr(schedule, "warmup", 0)
    whole_number("warmup", warmup, least=0)
    return int(warmup)


def is_function_of_step(schedule: Schedule) -> bool:
    """Return whether ``schedule`` is one of those here, which look at nothing but the step."""
    return isinstance(schedule, (Periodic, Once, Never))


def as_schedule(period: int | Schedule) -> Schedule:
    """Return ``period`` as a schedule; a whole number stands for `Periodic`.

    Raises:
        ValueError: A number that is not a positive whole number.
        TypeError: Neither a number nor an object with ``due``.
    """
    if isinstance(period, Schedule):
        return period
    if isinstance(period, (int, float)):
        return Periodic(period)  # Periodic refuses a float, by value
    raise TypeError(
        f"period={period!r} is neither a number of steps nor a schedule; pass a positive int, "
        "Once(at), or an object with due(step) -> bool."
    )
