"""The clock of a run, the active set, and the numbers that decide the next one."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynalora_optim._allocators import AllocationContext, Allocator
from dynalora_optim._importance import usable_scores
from dynalora_optim._record import AllocationRecord, Reallocation
from dynalora_optim._schedules import Schedule


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
    ) -> None:
        self.names = list(names)
        self.chosen: frozenset[str] = frozenset()
        self.updates = dict.fromkeys(self.names, 0)
        self.steps = 0
        self.record = AllocationRecord()
        self._allocator = allocator
        self._schedule = schedule
        self._seed = seed
        self._reallocations = 0
        self.active = active

    @property
    def active(self) -> float:
        """How many groups the next selection activates: a count (int) or a share (float)."""
        return self._active

    @active.setter
    def active(self, active: float) -> None:
        resolve_active(active, len(self.names))
        self._active = active

    def is_active(self, name: str) -> bool:
        """Return whether the group of this name gets gradients; one not allocated always does."""
        return name in self.chosen or name not in self.updates

    def active_names(self) -> tuple[str, ...]:
        """The groups that are active now, in forward order."""
        return tuple(name for name in self.names if name in self.chosen)

    def extend(self, names: Iterable[str], order: Iterable[str]) -> None:
        """Add groups, inactive until the next selection, and put all in ``order``."""
        self.updates.update(dict.fromkeys(names, 0))
        self.names = [name for name in order if name in self.updates]

    def select(self, scores: Mapping[str, float]) -> None:
        """Choose the active set by these scores and record it."""
        usable = usable_scores(scores)
        context = AllocationContext(
            scores=tuple(usable[name] for name in self.names),
            updates=tuple(self.updates[name] for name in self.names),
            active=resolve_active(self._active, len(self.names)),
            reallocation=self._reallocations,
            generator=random.Random(f"{self._seed}:{self._reallocations}"),
        )
        self.chosen = self._named(self._allocator.select(context))
        self._reallocations += 1
        self.record.append(Reallocation(self.steps, usable, self.active_names()))

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
        return self._schedule.due(self.steps)

    def clock_state(self) -> dict[str, Any]:
        """Return the numbers that belong to no single group."""
        return {
            "steps": self.steps,
            "reallocations": self._reallocations,
            "active_setting": self._active,
            "seed": self._seed,
        }

    def group_state(self, name: str) -> dict[str, Any]:
        """Return the numbers of one group."""
        return {"active": self.is_active(name), "updates": self.updates.get(name, 0)}

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
        self._seed = clock["seed"]
        self.updates = {name: groups[name]["updates"] for name in self.updates}
        self.chosen = frozenset(name for name in self.names if groups[name]["active"])
        self.record.load_state_dict(record)
        if not record:  # torch.distributed.checkpoint drops it: begin anew with what is active
            scores = {name: groups[name]["score"] for name in self.names}
            self.record.append(Reallocation(self.steps, scores, self.active_names()))


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
