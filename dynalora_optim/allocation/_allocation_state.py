"""The data of an allocation: what it stores, shows, and saves for a resumed run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from dynalora_optim.allocation._active import ActiveCount
from dynalora_optim.allocation._clock import Clock
from dynalora_optim.allocation._context import Allocator
from dynalora_optim.allocation._costs import Costs
from dynalora_optim.allocation._counters import GroupCounters
from dynalora_optim.allocation._record import AllocationRecord, Reallocation
from dynalora_optim.allocation._saved_costs import restored_costs
from dynalora_optim.allocation._schedules import Schedule
from dynalora_optim.allocation._selector import Selector
from dynalora_optim.allocation._spending import Spending


class AllocationState:
    """The data by which an `Allocation` chooses.

    Args:
        names: The groups to choose among, in forward order.
        active: How many groups are active; None for the default.
        allocator: Chooses the active groups.
        schedule: Decides after which steps to choose.
        seed: The seed of the allocator's random numbers.
        waiting: The number of groups that may join later.

    Attributes:
        names: The groups to choose among, in forward order.
        chosen: The groups that are active now.
        record: Every selection so far.
    """

    def __init__(
        self,
        names: Iterable[str],
        *,
        active: float | None,
        allocator: Allocator,
        schedule: Schedule,
        seed: int,
        waiting: int = 0,
    ) -> None:
        self.names = list(names)
        self.record = AllocationRecord()
        self._selector = Selector(allocator, seed)
        self._clock = Clock(schedule)
        self._active = ActiveCount(active, allocator, len(self.names) + waiting)
        self._spending = Spending(allocator)
        self.chosen: frozenset[str] = frozenset()
        self._counters = GroupCounters(self.names)

    @property
    def needs_costs(self) -> bool:
        """Whether the allocator decides from measured costs."""
        return self._spending.is_asked_for

    @property
    def costs(self) -> Costs | None:
        """The costs of all choices; None before they are measured."""
        return self._spending.costs

    @property
    def may_differ_between_ranks(self) -> bool:
        """Whether the schedule is a user's, which may depend on more than the number of steps."""
        return self._clock.may_differ_between_ranks

    @property
    def steps(self) -> int:
        """The optimizer steps done."""
        return self._clock.steps

    @property
    def allocator(self) -> Allocator:
        """The allocator, which chooses the active groups."""
        return self._selector.allocator

    @property
    def active(self) -> float:
        """How many groups the next selection activates: a count (int) or a share (float)."""
        return self._active.value

    @active.setter
    def active(self, active: float) -> None:
        self._active.set(active, len(self.names))

    @property
    def updates(self) -> Mapping[str, int]:
        """The gradient updates that each group has received (the counter C of equation 3)."""
        return self._counters.updates

    def _positions(self, names: Collection[str]) -> list[int]:
        return [position for position, name in enumerate(self.names) if name in names]

    def is_active(self, name: str) -> bool:
        """Return whether the group of this name is active; one that is not allocated always is."""
        return name in self.chosen or name not in self.updates

    def active_names(self) -> tuple[str, ...]:
        """The groups that are active now, in forward order."""
        return tuple(name for name in self.names if name in self.chosen)

    def age(self, name: str) -> int | None:
        """Return the steps since the group returned from a pause; None if it never has."""
        return self._counters.age(name, self.steps)

    def local_time(self, name: str) -> int:
        """Return the number of updates of a group; one that is not allocated gets one per step."""
        return self.updates.get(name, self.steps)

    def scaled_time(self, name: str) -> int:
        """Return how far a group is in a schedule for the whole run: see `GroupCounters`."""
        if name not in self.updates:
            return self.steps
        return self._counters.scaled_time(name, self.steps)

    def settings(self) -> tuple[object, ...]:
        """Return the values that must be the same on every rank."""
        options = [self.allocator, self._clock.schedule]
        shown = [repr(o) if is_dataclass(o) else type(o).__qualname__ for o in options]
        return (self._selector.seed, self.active, self.steps, *shown, *self.active_names())

    def clock_state(self) -> dict[str, Any]:
        """Return the numbers that belong to no single group."""
        return {
            **self._clock.state(),
            **self._selector.state(),
            "active_setting": self.active,
            **self._spending.state(),
        }

    def group_state(self, name: str) -> dict[str, Any]:
        """Return the numbers of one group."""
        if name not in self.updates:
            return {}
        return {"active": name in self.chosen, **self._counters.state(name)}

    @staticmethod
    def new_state() -> dict[str, Any]:
        """Return the numbers of a group that joins now."""
        return {"active": False, **GroupCounters(["new"]).state("new")}

    def check_state(
        self,
        clock: Mapping[str, Any],
        groups: Mapping[str, Mapping[str, Any]],
        names: Sequence[str],
    ) -> None:
        """Raise unless `load_state` can load these values when the groups are those of ``names``.

        Raises:
            ValueError: The number of active modules is not allowed or zero, or they exceed the
                budget.
        """
        self._active.check(len(names), clock["active_setting"])
        chosen = [place for place, name in enumerate(names) if groups[name]["active"]]
        if names and not chosen:
            raise ValueError("state_dict has no active module group; at least one always is.")
        if clock.get("costs"):  # `load_state` reads them also for an allocator without costs
            restored_costs(clock["costs"], modules=len(names))
        self._spending.check(clock, chosen, len(names))

    def load_state(
        self,
        clock: Mapping[str, Any],
        groups: Mapping[str, Mapping[str, Any]],
        record: Sequence[Mapping[str, Any]],
    ) -> None:
        """Load what `clock_state`, `group_state` and the record's ``state_dict`` returned."""
        self._clock.load(clock)
        self._selector.load(clock)
        self._active.restore(clock["active_setting"])
        self._spending.load(clock, len(self.names))
        self._counters.load(groups)
        self.chosen = frozenset(name for name in self.names if groups[name]["active"])
        self.record.load_state_dict(record)
        if self._selector.selections and not record:
            # torch.distributed.checkpoint drops the record: start a new one with the active groups.
            no_scores = dict.fromkeys(self.names, 0.0)
            self.record.append(Reallocation(self.steps, no_scores, self.active_names()))
