"""The clock of a run, the active set, and the numbers that decide the next one."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from dynalora_optim._base.checks import whole_number
from dynalora_optim.allocation._allocators import AllocationContext, Allocator
from dynalora_optim.allocation._bounded import StarvationBound
from dynalora_optim.allocation._budget import Budget
from dynalora_optim.allocation._costs import Costs, Plan
from dynalora_optim.allocation._record import AllocationRecord, Reallocation
from dynalora_optim.allocation._schedules import Never, Schedule, is_function_of_step
from dynalora_optim.importance._normalise import usable_scores

NEVER = -1  # the step at which a group that never paused came back


class Allocation:
    """Chooses among named groups, counts their updates, and keeps the record.

    It knows names and numbers only. The random numbers of selection i come from ``(seed, i)``, so
    that restoring a process's global generators, or drawing from them, does not disturb it.

    Attributes:
        names: The groups to choose among, in forward order.
        chosen: The groups that are active now.
        updates: The gradient updates each group has received (the counter C of equation 3).
        steps: The optimizer steps done.
        record: Every selection so far.
        costs: What each choice costs, once measured. A `Budget` selects nothing before.
    """

    def __init__(
        self,
        names: Iterable[str],
        *,
        active: float,
        allocator: Allocator,
        schedule: Schedule,
        seed: int,
        warmup: int = 0,
        max_idle_periods: int | None = None,
    ) -> None:
        whole_number("warmup", warmup, least=0)
        if max_idle_periods is not None:
            if isinstance(allocator, Budget):
                raise ValueError(
                    f"max_idle_periods={max_idle_periods} cannot be combined with a Budget: a "
                    "module that is due may not fit. Budget(floor=...) gives each its chance."
                )
            allocator = StarvationBound(allocator, max_idle_periods)
        self.names = list(names)
        self.record = AllocationRecord()
        self._allocator = allocator
        self._schedule = schedule
        self._warmup = warmup
        self._seed = seed
        self.active = active
        self.restart()

    def restart(self) -> None:
        """Begin as at the first step, with the settings of now."""
        self.chosen: frozenset[str] = frozenset()
        self.updates = dict.fromkeys(self.names, 0)
        self.steps = 0
        self.record.load_state_dict([])
        self.costs: Costs | None = None
        self._compute = 0.0  # backward passes so far, in units of one with all modules active
        self._reallocations = 0
        self._is_due = False  # a selection that the schedule does not know of
        self._idle = dict.fromkeys(self.names, 0)
        self._activated = dict.fromkeys(self.names, NEVER)
        if self.has_budget:
            self.chosen = frozenset(self.names)
        else:
            self.select(dict.fromkeys(self.names, 0.0))

    @property
    def has_budget(self) -> bool:
        """Whether the allocator needs measured costs."""
        return isinstance(self._allocator, Budget)

    @property
    def may_differ_between_ranks(self) -> bool:
        """Whether the schedule is a user's, which may look at more than the steps done."""
        return not is_function_of_step(self._schedule)

    @property
    def active(self) -> float:
        """How many groups the next selection activates: a count (int) or a share (float)."""
        return self._active

    @active.setter
    def active(self, active: float) -> None:
        self._check(active, len(self.names))
        self._active = active

    @property
    def _count(self) -> int:
        return resolve_active(self._active, len(self.names))

    def is_unmeasured(self, elements: int) -> bool:
        """Return whether a batch of so many elements has to be measured before it is used."""
        if not self.has_budget:
            return False
        return self.costs is None or elements > self.costs.batch

    def take_costs(self, costs: Costs) -> None:
        """Make the first selection by these costs, or fit the present one to them.

        Raises:
            ValueError: The budget cannot hold any choice. Nothing is changed then.
        """
        former, self.costs = self.costs, costs
        try:
            if not self._reallocations:
                self.select(dict.fromkeys(self.names, 0.0))
            else:
                self._shrink()
        except ValueError:
            self.costs = former
            raise

    def plan(self, names: Collection[str]) -> Plan | None:
        """Return what to checkpoint while these groups are active; None without a budget.

        Raises:
            ValueError: The budget cannot hold them.
        """
        if self.costs is None or not isinstance(self._allocator, Budget):
            return None
        return self._allocator.plan(self.costs, self._positions(names))

    def current_plan(self, costs: Costs) -> Plan:
        """Return what is in force now, at these ``costs``; without a budget all is kept in full."""
        chosen = self._positions(self.chosen)
        if isinstance(self._allocator, Budget):
            return self._allocator.plan(costs, chosen)
        return Plan(costs.blocks_of(chosen))

    def _positions(self, names: Collection[str]) -> list[int]:
        return [position for position, name in enumerate(self.names) if name in names]

    def _shrink(self) -> None:
        """Drop the lowest blocks until the rest fits a batch larger than those before."""
        assert self.costs is not None
        assert isinstance(self._allocator, Budget)
        kept = self._allocator.fitting(self.costs, self._positions(self.chosen))
        if len(kept) < len(self.chosen):
            self.chosen = self._named(kept)
            self.record.append(
                Reallocation(self.steps, self.record[-1].scores, self.active_names())
            )

    def is_active(self, name: str) -> bool:
        """Return whether the group of this name gets gradients; one not allocated always does."""
        return name in self.chosen or name not in self.updates

    def active_names(self) -> tuple[str, ...]:
        """The groups that are active now, in forward order."""
        return tuple(name for name in self.names if name in self.chosen)

    def extend(self, names: Collection[str], order: Iterable[str]) -> None:
        """Add groups and put all in ``order``.

        Where all groups are active the new ones are too. Else they wait for the next selection,
        which is due after the coming step: a schedule such as `Once` may have none left.

        Raises:
            ValueError: ``max_idle_periods`` cannot be kept with so many groups.
        """
        self._check(self._active, len(self.names) + len(names))
        everyone = len(self.chosen) == len(self.names)
        for name in names:
            self.updates[name], self._idle[name], self._activated[name] = 0, 0, NEVER
        places = {name: place for place, name in enumerate(order)}
        # Modules that have left the model come last, and count as if they were there.
        self.names = sorted([*self.names, *names], key=lambda n: places.get(n, len(places)))
        self.costs = None  # a budget measures anew
        if everyone:
            self.chosen |= frozenset(names)
        if everyone and self.record:
            scores = {**self.record[-1].scores, **dict.fromkeys(names, 0.0)}
            self.record.append(Reallocation(self.steps, scores, self.active_names()))
        elif not everyone:
            self._is_due |= bool(names)

    def _check(self, active: float, modules: int) -> None:
        """Raise if so many modules cannot be active."""
        count = resolve_active(active, modules)
        if isinstance(self._allocator, StarvationBound):
            self._allocator.check(count, modules)

    def select(self, scores: Mapping[str, float]) -> frozenset[str]:
        """Choose the active set by these scores and record it; return who was inactive before."""
        usable = usable_scores(scores)
        before = self.chosen
        self.chosen = self._named(self._selection(usable))
        self.record.append(Reallocation(self.steps, usable, self.active_names()))
        self._idle = {n: 0 if n in self.chosen else idle + 1 for n, idle in self._idle.items()}
        self._reallocations += 1
        self._is_due = False
        if self._reallocations == 1:
            return frozenset()  # the beginning of training is no return from a pause
        self._activated.update(dict.fromkeys(self.chosen - before, self.steps))
        return self.chosen - before

    def _selection(self, scores: Mapping[str, float]) -> Iterable[int]:
        if self.steps < self._warmup:
            return range(len(self.names))
        context = AllocationContext(
            scores=tuple(scores[name] for name in self.names),
            updates=tuple(self.updates[name] for name in self.names),
            active=self._count,
            reallocation=self._reallocations,
            generator=random.Random(f"{self._seed}:{self._reallocations}"),
            idle=tuple(self._idle[name] for name in self.names),
            costs=self.costs,
            mean_compute=self._compute / max(self.steps, 1),
        )
        return self._allocator.select(context)

    def _named(self, selection: Iterable[int]) -> frozenset[str]:
        positions = list(selection)
        valid = all(0 <= position < len(self.names) for position in positions)
        if not positions or not valid or len(set(positions)) < len(positions):
            raise ValueError(
                f"allocator {self._allocator!r} selected {positions}; it must return at least one "
                f"position in 0..{len(self.names) - 1}, each once."
            )
        return frozenset(self.names[position] for position in positions)

    def hold(self, names: Iterable[str]) -> None:
        """Make these groups active, and choose no others from here on."""
        self.chosen = frozenset(names)
        self._schedule, self._warmup, self._is_due = Never(), 0, False

    def advance(self, updated: Iterable[str]) -> bool:
        """Count one optimizer step, in which ``updated`` moved; return whether to reallocate."""
        for name in updated:
            if name in self.updates:
                self.updates[name] += 1
        self.steps += 1
        self._compute += self._cost()
        self.record.advance()
        if self.steps <= self._warmup:
            self._is_due = self.steps == self._warmup
        else:  # one that was interrupted stays due
            self._is_due |= self._schedule.due(self.steps - self._warmup)
        return self._is_due

    def _cost(self) -> float:
        """The FLOPs of a backward pass now, as a share of one with all modules active."""
        plan = self.plan(self.chosen)
        if plan is None or self.costs is None:
            return 0.0
        return self.costs.flops(plan) / self.costs.flops(self.costs.all_active)

    def age(self, name: str) -> int | None:
        """Return the steps since the group came back from a pause; None if it never paused."""
        activated = self._activated.get(name, NEVER)
        return None if activated == NEVER else self.steps - activated

    def local_time(self, name: str) -> tuple[int, float]:
        """Return the updates of a group and the share of modules that are active with it.

        A group that is not allocated has had one update per step.
        """
        if name not in self.updates:
            return self.steps, 1.0
        return self.updates[name], self._count / len(self.names)

    def settings(self) -> tuple[object, ...]:
        """Return what every rank must have in common."""
        options = [self._allocator, self._schedule]
        shown = [repr(o) if is_dataclass(o) else type(o).__qualname__ for o in options]
        return (self._seed, self._active, self.steps, *shown, *self.active_names())

    def clock_state(self) -> dict[str, Any]:
        """Return the numbers that belong to no single group."""
        return {
            "steps": self.steps,
            "reallocations": self._reallocations,
            "active_setting": self._active,
            "is_due": self._is_due,
            "seed": self._seed,
            "compute": self._compute,
        }

    def group_state(self, name: str) -> dict[str, Any]:
        """Return the numbers of one group."""
        if name not in self.updates:
            return {}
        return {
            "active": name in self.chosen,
            "updates": self.updates[name],
            "idle": self._idle[name],
            "activated": self._activated[name],
        }

    def check_state(
        self, clock: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Raise unless `load_state` could go on with these.

        Raises:
            ValueError: So many modules cannot be active, none is, or they exceed the budget.
        """
        self._check(clock["active_setting"], len(self.names))
        chosen = [name for name in self.names if groups[name]["active"]]
        if not chosen:
            raise ValueError("state_dict has no active module group; at least one always is.")
        if clock.get("costs") and isinstance(self._allocator, Budget):
            costs = Costs.from_state_dict(clock["costs"])
            costs.check(modules=len(self.names))
            self._allocator.fitting(costs, self._positions(chosen))
            self._allocator.plan(costs, self._positions(chosen))

    def load_state(
        self,
        clock: Mapping[str, Any],
        groups: Mapping[str, Mapping[str, Any]],
        record: Sequence[Mapping[str, Any]],
    ) -> None:
        """Take over what `clock_state`, `group_state` and the record's ``state_dict`` returned."""
        self.steps = clock["steps"]
        self._reallocations = clock["reallocations"]
        self._active = clock["active_setting"]
        self._is_due = clock["is_due"]
        self._seed = clock["seed"]
        self._compute = clock["compute"]
        self.costs = Costs.from_state_dict(clock["costs"]) if clock.get("costs") else None
        self.updates = {name: groups[name]["updates"] for name in self.updates}
        self._idle = {name: groups[name]["idle"] for name in self.updates}
        self._activated = {name: groups[name]["activated"] for name in self.updates}
        self.chosen = frozenset(name for name in self.names if groups[name]["active"])
        self.record.load_state_dict(record)
        if self._reallocations and not record:
            # torch.distributed.checkpoint drops it: begin anew with what is active.
            no_scores = dict.fromkeys(self.names, 0.0)
            self.record.append(Reallocation(self.steps, no_scores, self.active_names()))


def resolve_active(active: float, modules: int) -> int:
    """Return how many of ``modules`` are active: a count stands for itself, a share is rounded.

    Args:
        active: A whole number of modules, or a float share in (0, 1].
        modules: The number of module groups, M.

    Raises:
        TypeError: Not a number.
        ValueError: Outside its range, or nan.
    """
    if isinstance(active, bool) or not isinstance(active, (int, float)):
        raise TypeError(
            f"active={active!r} is not a number; pass a count (int) of at most {modules} modules, "
            "or a share (float) in (0, 1]."
        )
    if isinstance(active, int):
        if active > modules:
            raise ValueError(
                f"active={active} exceeds the {modules} adapter groups found in the model; pass "
                f"at most {modules}, or a fraction in (0, 1]."
            )
        if active < 1:
            raise ValueError(
                f"active={active} leaves no module to train; pass a count from 1 to {modules}, or "
                "a fraction in (0, 1]."
            )
        return active
    if not 0 < active <= 1:  # nan fails too
        raise ValueError(
            f"active={active} is not a share in (0, 1]; pass one, or a whole number (int) from 1 "
            f"to {modules}."
        )
    return max(1, round(active * modules))
