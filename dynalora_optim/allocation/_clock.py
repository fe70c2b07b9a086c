"""The clock of a run: it counts optimizer steps, and knows after which of them to select."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynalora_optim.allocation._schedules import (
    Schedule,
    is_function_of_step,
    warmup_of,
)


class Clock:
    """Counts optimizer steps and asks the schedule.

    Attributes:
        schedule: After which steps to select.
        steps: The optimizer steps done.
        is_stopped: Whether no selection is made any more, whatever asks for one.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._warmup = warmup_of(schedule)
        self.restart()

    def restart(self) -> None:
        """Start again from the first step."""
        self.steps = 0
        self.is_stopped = self._is_due = False

    def stop(self) -> None:
        """Make no further selection."""
        self.is_stopped = True

    @property
    def is_warming_up(self) -> bool:
        """Whether the warm-up, in which all modules are active, is not over."""
        return self.steps < self._warmup

    @property
    def may_differ_between_ranks(self) -> bool:
        """Whether the schedule is a user's, which may depend on more than the number of steps."""
        return not (self.is_stopped or is_function_of_step(self.schedule))

    def demand(self) -> None:
        """Ask for a selection after the next step, whether or not the schedule does."""
        self._is_due = True

    def settle(self) -> None:
        """Record that a selection was made; one that was interrupted stays due."""
        self._is_due = False

    def advance(self) -> bool:
        """Count one step; return whether to select now."""
        self.steps += 1
        if not self.is_warming_up:
            self._is_due |= self.steps == self._warmup or self.schedule.due(self.steps)
        return self._is_due and not self.is_stopped

    def state(self) -> dict[str, Any]:
        """Return the values that a resumed run needs."""
        return {"steps": self.steps, "is_due": self._is_due, "is_held": self.is_stopped}

    def load(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned."""
        self.steps, self._is_due = state["steps"], state["is_due"]
        self.is_stopped = state["is_held"]
