"""When to reallocate (section 3.3 of the paper). The clock counts optimizer steps and nothing else.

A schedule is any object with ``due(step) -> bool``. It is asked once after each optimizer step with
the number of steps done so far, so neither gradient accumulation, nor evaluation, nor a step that a
``GradScaler`` skipped moves it. The first selection, at step 0, is made whatever it answers.
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

    Raises:
        ValueError: ``n`` is not a positive whole number.
    """

    n: int

    def __post_init__(self) -> None:
        whole_number("period", self.n, least=1)

    def due(self, step: int) -> bool:
        """Return whether ``step`` is a multiple of ``n``."""
        return step % self.n == 0


@dataclass(frozen=True)
class Once:
    """Select at the beginning and once more after ``at`` optimizer steps (the paper's alpha).

    Raises:
        ValueError: ``at`` is not a positive whole number.
    """

    at: int

    def __post_init__(self) -> None:
        whole_number("Once(at)", self.at, least=1)

    def due(self, step: int) -> bool:
        """Return whether ``step`` is ``at``."""
        return step == self.at


@dataclass(frozen=True)
class Never:
    """Do not reallocate."""

    def due(self, step: int) -> bool:
        """Return False."""
        return False


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
