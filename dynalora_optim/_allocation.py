"""The clock of a run, the active set, and the numbers that decide the next one."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from dynalora_optim._allocators import AllocationContext, Allocator
from dynalora_optim._checks import whole_number
from dynalora_optim._record import AllocationRecord, Reallocation
from dynalora_optim._schedules import Schedule
from dynalora_optim._scores import usable_scores
from dynalora_optim._starvation import StarvationBound

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
            allocator = StarvationBound(allocator, max_idle_periods)
        self.names = list(names)
        self.chosen: frozenset[str] = frozenset()
        self.updates = dict.fromkeys(self.names, 0)
        self.steps = 0
        self.record = AllocationRecord()
        self._allocator = allocator
        self._schedule = schedule
        self._warmup = warmup
        self._seed = seed
        self._reallocations = 0
        self._is_due = False  # a selection that the schedule does not know of
        self._idle = dict.fromkeys(self.names, 0)
        self._activated = dict.fromkeys(self.names, NEVER)
        self.active = active

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
        self.names = [name for name in order if name in self.updates]
        if everyone:
            self.chosen |= frozenset(names)
            scores = {**self.record[-1].scores, **dict.fromkeys(names, 0.0)}
            self.record.append(Reallocation(self.steps, scores, self.active_names()))
        else:
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

    def advance(self, updated: Iterable[str]) -> bool:
        """Count one optimizer step, in which ``updated`` moved; return whether to reallocate."""
        for name in updated:
            if name in self.updates:
                self.updates[name] += 1
        self.steps += 1
        self.record.advance()
        if self.steps <= self._warmup:
            return self.steps == self._warmup
        return self._schedule.due(self.steps - self._warmup) or self._is_due

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

    def clock_state(self) -> dict[str, Any]:
        """Return the numbers that belong to no single group."""
        return {
            "steps": self.steps,
            "reallocations": self._reallocations,
            "active_setting": self._active,
            "is_due": self._is_due,
            "seed": self._seed,
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
        self.updates = {name: groups[name]["updates"] for name in self.updates}
        self._idle = {name: groups[name]["idle"] for name in self.updates}
        self._activated = {name: groups[name]["activated"] for name in self.updates}
        self.chosen = frozenset(name for name in self.names if groups[name]["active"])
        self.record.load_state_dict(record)
        if not record:  # torch.distributed.checkpoint drops it: begin anew with what is active
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
