"""The counters of each group: its updates, its pauses, and when it returned from a pause."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

_NEVER = -1  # the value of a group that has never returned from a pause


class GroupCounters:
    """Counters of named groups.

    Attributes:
        updates: The gradient updates that each group has received (the counter C of equation 3).
        idle: How many selections in a row have left each group out.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.updates: dict[str, int] = {}
        self.idle: dict[str, int] = {}
        self._activated: dict[str, int] = {}
        self._total = 0
        self.add(names)

    def add(self, names: Iterable[str]) -> None:
        """Start to count for these groups."""
        for name in names:
            self.updates[name], self.idle[name], self._activated[name] = 0, 0, _NEVER

    def count_updates(self, names: Iterable[str]) -> None:
        """Count one update for each allocated group among these."""
        for name in names:
            if name in self.updates:
                self.updates[name] += 1
                self._total += 1

    def share(self, steps: int) -> float:
        """Return the share of groups that a step updated, on average; 0 before the first step."""
        return self._total / (steps * len(self.updates)) if steps else 0.0

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
        }

    def load(self, groups: Mapping[str, Mapping[str, Any]]) -> None:
        """Load what `state` returned for each group."""
        self.updates = {name: groups[name]["updates"] for name in self.updates}
        self._total = sum(self.updates.values())
        self.idle = {name: groups[name]["idle"] for name in self.updates}
        self._activated = {name: groups[name]["activated"] for name in self.updates}
