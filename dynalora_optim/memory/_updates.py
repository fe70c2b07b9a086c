"""Counting the temporary tensors of an optimizer's own step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dynalora_optim._base.live_bytes import LiveBytes
from dynalora_optim.memory._habits import Habits

T = TypeVar("T")
_WATCHED = 2  # optimizer steps whose temporary tensors are counted


class Updates:
    """Counts the temporary tensors of the first updates of a run, for its ``habits``."""

    def __init__(self, habits: Habits) -> None:
        self._habits = habits
        self._left = 0 if habits.is_known else _WATCHED

    def watched(self, update: Callable[[], T], largest: Callable[[], int]) -> T:
        """Run an optimizer's ``update``; in the first steps, count its temporary tensors.

        Args:
            update: Updates the parameters.
            largest: Returns the bytes of the largest gradient of a group.
        """
        if not self._left:
            return update()
        self._left -= 1
        with LiveBytes() as memory:
            updated = update()
            temporary = memory.peak - memory.live  # what is still alive is state
        if size := largest():
            self._habits.update = max(self._habits.update, temporary / size)
        return updated
