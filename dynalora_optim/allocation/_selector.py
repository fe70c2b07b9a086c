"""Calling an allocator, and checking its selection."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynalora_optim.allocation._context import AllocationContext, Allocator
from dynalora_optim.allocation._costs import Costs
from dynalora_optim.allocation._counters import GroupCounters


class Selector:
    """Makes one selection after another.

    The random numbers of selection i come from ``(seed, i)``. They do not depend on the global
    generators of the process.

    Attributes:
        allocator: Chooses the active groups.
        seed: The seed of the allocator's random numbers.
        selections: How many selections have been made.
    """

    def __init__(self, allocator: Allocator, seed: int) -> None:
        self.allocator = allocator
        self.seed = seed
        self.selections = 0

    def choose(
        self,
        names: Sequence[str],
        scores: Mapping[str, float],
        counters: GroupCounters,
        *,
        active: int,
        costs: Costs | None,
        mean_compute: float,
    ) -> frozenset[str]:
        """Return which of the groups of these ``names`` the allocator chooses.

        Raises:
            ValueError: It chooses no group, a position that is not a group's, or one group twice.
        """
        context = AllocationContext(
            scores=tuple(scores[name] for name in names),
            updates=tuple(counters.updates[name] for name in names),
            active=active,
            reallocation=self.selections,
            generator=random.Random(f"{self.seed}:{self.selections}"),
            idle=tuple(counters.idle[name] for name in names),
            costs=costs,
            mean_compute=mean_compute,
        )
        return self.named(names, self.allocator.select(context))

    def named(self, names: Sequence[str], selection: Iterable[int]) -> frozenset[str]:
        """Return the names at the positions that the allocator has returned.

        Raises:
            ValueError: There are no positions, or one is out of range, or is there twice.
        """
        positions = list(selection)
        valid = all(0 <= position < len(names) for position in positions)
        if not positions or not valid or len(set(positions)) < len(positions):
            raise ValueError(
                f"allocator {self.allocator!r} selected {positions}; it must return at least one "
                f"position in 0..{len(names) - 1}, each once."
            )
        return frozenset(names[position] for position in positions)

    def state(self) -> dict[str, Any]:
        """Return the values that a resumed run needs."""
        return {"reallocations": self.selections, "seed": self.seed}

    def load(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned."""
        self.selections, self.seed = state["reallocations"], state["seed"]
