"""The counters of each group: its updates, its pauses, and when it returned from a pause."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

_NEVER = -1  # the value of a group that has never returned from a pause


class GroupCounters:
    """Counters of named groups.

    A group's *scaled time* is its step of a schedule for the whole run: at step s of the run, a
    group that has had the mean number of updates of all groups is at step s, and one with half as
    many is at s/2. No group is ever beyond s, and none goes back.

    Attributes:
        updates: The gradient updates that each group has received (the counter C of equation 3).
        idle: How many selections in a row have left each group out.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.updates: dict[str, int] = {}
        self.idle: dict[str, int] = {}
        self._activated: dict[str, int] = {}
        self._reached: dict[str, int] = {}  # the scaled time after the last update
        self._total = 0
        self.add(names)

    def add(self, names: Iterable[str]) -> None:
        """Start to count for these groups."""
        for name in names:
            self.updates[name], self.idle[name], self._activated[name] = 0, 0, _NEVER
            self._reached[name] = 0

    def count_updates(self, names: Iterable[str], step: int) -> None:
        """Count one update, in optimizer step number ``step``, for each allocated group of these.

        ``step`` is counted from 1.
        """
        updated = [name for name in names if name in self.updates]
        for name in updated:
            self.updates[name] += 1
        self._total += len(updated)
        for name in updated:
            self._reached[name] = self.scaled_time(name, step)

    def scaled_time(self, name: str, steps: int) -> int:
        """Return the scaled time of a group, rounded, after this many optimizer steps."""
        updates = self.updates[name]
        # Updates divided by the share of groups that a step has updated, on average.
        time = updates * steps * len(self.updates) / self._total if updates else 0.0
        # It falls for an inactive group while more groups than before are active.
        return max(self._reached[name], round(min(time, steps)))

    def count_selection(self, chosen: Collection[str]) -> None:
        """Count one selection, in which these groups were ``chosen``."""
        self.idle = {name: 0 if name in chosen else n + 1 for name, n in self.idle.items()}

    def mark_returned(self, names: Iterable[str], step: int) -> None:
        """Record that these groups returned from a pause after optimizer step ``step``."""
        self._activated.update(dict.fromkeys(names, step))

    def age(self, name: str, step: int) -> int | None:
        """Return the steps since the group returned from a pause; None if it never has."""
        activated = self._activated.get(name, _NEVER)
        return None if activated == _NEVER else step - activated

    def state(self, name: str) -> dict[str, int]:
        """Return the numbers of one group."""
        return {
            "updates": self.updates[name],
            "idle": self.idle[name],
            "activated": self._activated[name],
            "reached": self._reached[name],
        }

    def load(self, groups: Mapping[str, Mapping[str, Any]]) -> None:
        """Load what `state` returned for each group."""
        self.updates = {name: groups[name]["updates"] for name in self.updates}
        self._total = sum(self.updates.values())
        self.idle = {name: groups[name]["idle"] for name in self.updates}
        self._activated = {name: groups[name]["activated"] for name in self.updates}
        self._reached = {name: groups[name].get("reached", 0) for name in self.updates}
