"""The clock of a run: optimizer steps, and after which of them a selection is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynalora_optim.allocation._schedules import (
    Never,
    Schedule,
    is_function_of_step,
    warmup_of,
)


class Clock:
    """Counts optimizer steps and asks the schedule.

    Attributes:
        schedule: After which steps to select.
        steps: The optimizer steps done.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._warmup = warmup_of(schedule)
        self.restart()

    def restart(self) -> None:
        """Begin as at the first step."""
        self.steps = 0
        self._is_due = False

    def stop(self) -> None:
        """Ask for no selection from here on."""
        self.schedule, self._warmup, self._is_due = Never(), 0, False

    @property
    def is_warming_up(self) -> bool:
        """Whether all modules are to be active still."""
        return self.steps < self._warmup

    @property
    def may_differ_between_ranks(self) -> bool:
        """Whether the schedule is a user's, which may look at more than the steps done."""
        return not is_function_of_step(self.schedule)

    def demand(self) -> None:
        """Have a selection made after the coming step, whatever the schedule says."""
        self._is_due = True

    def settle(self) -> None:
        """Note that a selection was made; one that was interrupted stays due."""
        self._is_due = False

    def advance(self) -> bool:
        """Count one step; return whether to select now."""
        self.steps += 1
        if self.is_warming_up:
            self._is_due = False
        else:
            self._is_due |= self.steps == self._warmup or self.schedule.due(self.steps)
        return self._is_due

    def state(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        return {"steps": self.steps, "is_due": self._is_due}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self.steps, self._is_due = state["steps"], state["is_due"]
