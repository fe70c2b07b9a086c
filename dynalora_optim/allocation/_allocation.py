"""The clock of a run, the active set, and the numbers that decide the next one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from dynalora_optim.allocation._active import ActiveCount
from dynalora_optim.allocation._choice import Choice
from dynalora_optim.allocation._clock import Clock
from dynalora_optim.allocation._context import Allocator, uses_active
from dynalora_optim.allocation._costs import Costs, Plan
from dynalora_optim.allocation._counters import GroupCounters
from dynalora_optim.allocation._record import AllocationRecord, Reallocation
from dynalora_optim.allocation._schedules import Schedule
from dynalora_optim.allocation._selector import Selector
from dynalora_optim.allocation._spending import Spending
from dynalora_optim.groups._layout import BlockLayout
from dynalora_optim.importance._normalise import usable_scores


class Allocation:
    """Chooses among named groups, counts their updates, and keeps the record.

    It knows names and numbers only.

    Args:
        names: The groups to choose among, in forward order.
        active: How many are active; None for the default.
        allocator: Who chooses.
        schedule: When.
        seed: Of the allocator's random numbers.
        layout: Where the groups are, if blocks in which nothing trains are to be recomputed.

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
        layout: BlockLayout | None = None,
    ) -> None:
        self.names = list(names)
        self.record = AllocationRecord()
        self._selector = Selector(allocator, seed)
        self._clock = Clock(schedule)
        self._active = ActiveCount(active, allocator, len(self.names))
        self._spending = Spending(allocator)
        self._layout = layout
        self.restart()

    def restart(self) -> None:
        """Begin as at the first step, with the settings of now."""
        self.chosen: frozenset[str] = frozenset()
        self._counters = GroupCounters(self.names)
        self._clock.restart()
        self.record.load_state_dict([])
        self._spending.restart()
        self._selector.selections = 0
        self._is_held = False
        if self.needs_costs:
            self.chosen = frozenset(self.names)
        else:
            self.select(dict.fromkeys(self.names, 0.0))

    @property
    def needs_costs(self) -> bool:
        """Whether the allocator decides from measured costs."""
        return self._spending.is_asked_for

    @property
    def costs(self) -> Costs | None:
        """What each choice costs; None before it was measured."""
        return self._spending.costs

    @property
    def may_differ_between_ranks(self) -> bool:
        """Whether the schedule is a user's, which may look at more than the steps done."""
        return self._clock.may_differ_between_ranks

    @property
    def steps(self) -> int:
        """The optimizer steps done."""
        return self._clock.steps

    @property
    def allocator(self) -> Allocator:
        """Who chooses."""
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

    @property
    def choice(self) -> Choice:
        """What is in force now.

        Raises:
            ValueError: The allocator cannot keep what was chosen.
        """
        return self.choice_of(self.chosen)

    @property
    def everyone(self) -> Choice:
        """All groups active at once."""
        return self.choice_of(self.names)

    def choice_of(self, names: Collection[str]) -> Choice:
        """Return what holds while these groups are active.

        Raises:
            ValueError: The allocator cannot have them active together.
        """
        plan = self._spending.plan(self._positions(names))
        if plan:
            return Choice(frozenset(names), plan.checkpointed)
        idle = self._layout.idle(names) if self._layout else frozenset[int]()
        return Choice(frozenset(names), idle)

    def is_unmeasured(self, elements: int) -> bool:
        """Return whether a batch of so many elements has to be measured before it is used."""
        return self._spending.is_unmeasured(elements)

    def take_costs(self, costs: Costs) -> None:
        """Make the first selection by these costs, or fit the present one to them.

        Raises:
            ValueError: The allocator cannot make any choice. Nothing is changed then.
        """
        former, self._spending.costs = self.costs, costs
        try:
            if not self._selector.selections and not self._is_held:
                self.select(dict.fromkeys(self.names, 0.0))
            else:
                self._fit()
        except ValueError:
            self._spending.costs = former
            raise

    def current_plan(self, costs: Costs) -> Plan:
        """Return what is in force now, at these ``costs``; without a budget all is kept in full."""
        return self._spending.plan_at(costs, self._positions(self.chosen))

    def _positions(self, names: Collection[str]) -> list[int]:
        return [position for position, name in enumerate(self.names) if name in names]

    def _fit(self) -> None:
        """Leave out what does not fit a batch larger than those before."""
        kept = self._spending.fitting(self._positions(self.chosen))
        if len(kept) < len(self.chosen):
            self.chosen = self._selector.named(self.names, kept)
            self.record.append(
                Reallocation(self.steps, self.record[-1].scores, self.active_names())
            )

    def is_active(self, name: str) -> bool:
        """Return whether the group of this name gets gradients; one not allocated always does."""
        return name in self.chosen or name not in self.updates

    def active_names(self) -> tuple[str, ...]:
        """The groups that are active now, in forward order."""
        return tuple(name for name in self.names if name in self.chosen)

    def extend(
        self, names: Collection[str], order: Iterable[str], layout: BlockLayout | None = None
    ) -> None:
        """Add groups and put all in ``order``.

        Where all groups are active the new ones are too. Else they wait for the next selection,
        which is due after the coming step: a schedule such as `Once` may have none left.

        Raises:
            ValueError: What the allocator promises cannot be kept with so many groups.
        """
        self._active.check(len(self.names) + len(names))
        is_everyone = len(self.chosen) == len(self.names)
        self._counters.add(names)
        places = {name: place for place, name in enumerate(order)}
        # Modules that have left the model come last, and count as if they were there.
        self.names = sorted([*self.names, *names], key=lambda n: places.get(n, len(places)))
        self._layout = layout if self._layout else None
        self._spending.costs = None  # a budget measures anew
        if is_everyone:
            self.chosen |= frozenset(names)
        if is_everyone and self.record:
            scores = {**self.record[-1].scores, **dict.fromkeys(names, 0.0)}
            self.record.append(Reallocation(self.steps, scores, self.active_names()))
        elif names and not is_everyone:
            self._clock.demand()

    def select(self, scores: Mapping[str, float]) -> frozenset[str]:
        """Choose the active set by these scores and record it; return who was inactive before."""
        usable = usable_scores(scores)
        before = self.chosen
        self.chosen = self._selection(usable)
        self.record.append(Reallocation(self.steps, usable, self.active_names()))
        self._counters.count_selection(self.chosen)
        self._selector.selections += 1
        self._clock.settle()
        if self._selector.selections == 1:
            return frozenset()  # the beginning of training is no return from a pause
        self._counters.mark_returned(self.chosen - before, self.steps)
        return self.chosen - before

    def _selection(self, scores: Mapping[str, float]) -> frozenset[str]:
        if self._clock.is_warming_up:
            return frozenset(self.names)
        return self._selector.choose(
            self.names,
            scores,
            self._counters,
            active=self._active.resolve(len(self.names)),
            costs=self.costs,
            mean_compute=self._spending.mean_compute(self.steps),
        )

    def hold(self, names: Collection[str]) -> None:
        """Make these groups active, and choose no others from here on.

        Raises:
            ValueError: Unknown names, none, or more than the allocator can have active together.
        """
        unknown = [name for name in names if name not in self.updates]
        if unknown or not names:
            raise ValueError(
                f"hold({list(names)!r}): {unknown[0]!r} is no module group; pass some of "
                f"{self.names}."
                if unknown
                else "hold() got no module group; at least one must be active."
            )
        self.choice_of(names)
        self.chosen = frozenset(names)
        self._is_held = True
        self._clock.stop()

    def advance(self, updated: Iterable[str]) -> bool:
        """Count one optimizer step, in which ``updated`` moved; return whether to reallocate."""
        self._counters.count_updates(updated)
        self._spending.advance(self._positions(self.chosen))
        self.record.advance()
        return self._clock.advance()

    def age(self, name: str) -> int | None:
        """Return the steps since the group came back from a pause; None if it never paused."""
        return self._counters.age(name, self.steps)

    def local_time(self, name: str) -> tuple[int, float]:
        """Return the updates of a group and the share of modules that are active with it.

        A group that is not allocated has had one update per step.
        """
        if name not in self.updates:
            return self.steps, 1.0
        return self.updates[name], self._share()

    def _share(self) -> float:
        if uses_active(self.allocator):
            return self._active.resolve(len(self.names)) / len(self.names)
        return self._counters.share(self.steps) or len(self.chosen) / len(self.names)

    def settings(self) -> tuple[object, ...]:
        """Return what every rank must have in common."""
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

    def check_state(
        self, clock: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Raise unless `load_state` could go on with these.

        Raises:
            ValueError: So many modules cannot be active, none is, or they exceed the budget.
        """
        self._active.check(len(self.names), clock["active_setting"])
        chosen = [name for name in self.names if groups[name]["active"]]
        if not chosen:
            raise ValueError("state_dict has no active module group; at least one always is.")
        self._spending.check(clock, self._positions(chosen), len(self.names))

    def load_state(
        self,
        clock: Mapping[str, Any],
        groups: Mapping[str, Mapping[str, Any]],
        record: Sequence[Mapping[str, Any]],
    ) -> None:
        """Take over what `clock_state`, `group_state` and the record's ``state_dict`` returned."""
        self._clock.load(clock)
        self._selector.load(clock)
        self._active.restore(clock["active_setting"])
        self._spending.load(clock)
        self._counters.load(groups)
        self.chosen = frozenset(name for name in self.names if groups[name]["active"])
        self.record.load_state_dict(record)
        if self._selector.selections and not record:
            # torch.distributed.checkpoint drops it: begin anew with what is active.
            no_scores = dict.fromkeys(self.names, 0.0)
            self.record.append(Reallocation(self.steps, no_scores, self.active_names()))
