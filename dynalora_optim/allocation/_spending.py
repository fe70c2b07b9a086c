"""The measured costs of all choices, and the compute that the run has used so far."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dynalora_optim.allocation._context import Allocator, CostAware
from dynalora_optim.allocation._costs import Costs, Plan


class Spending:
    """Asks a `CostAware` allocator for its plans; any other has neither costs nor plans.

    Modules are numbered in forward order, as for allocators.

    Attributes:
        costs: The costs of all choices; None before they are measured.
    """

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator if isinstance(allocator, CostAware) else None
        self.restart()

    def restart(self) -> None:
        """Delete the costs and the compute used so far."""
        self.costs: Costs | None = None
        self._compute = 0.0  # backward passes so far, in units of one with all modules active

    @property
    def is_asked_for(self) -> bool:
        """Whether the allocator decides from measured costs."""
        return self._allocator is not None

    def is_unmeasured(self, elements: int) -> bool:
        """Return whether a batch of this many elements must be measured before it is used."""
        if not self.is_asked_for:
            return False
        return self.costs is None or elements > self.costs.batch

    def plan(self, chosen: Collection[int]) -> Plan | None:
        """Return the plan in which the ``chosen`` modules are active; None without costs.

        Raises:
            ValueError: The allocator does not allow these modules to be active together.
        """
        if self._allocator is None or self.costs is None:
            return None
        return self._allocator.plan(self.costs, chosen)

    def plan_at(self, costs: Costs, chosen: Collection[int]) -> Plan:
        """Return the plan at these ``costs``; only a `CostAware` allocator checkpoints blocks."""
        if self._allocator is None:
            return Plan(costs.blocks_of(chosen))
        return self._allocator.plan(costs, chosen)

    def fitting(self, chosen: Collection[int]) -> Collection[int]:
        """Return those of the ``chosen`` modules that can stay active at the current costs.

        Raises:
            ValueError: No module can stay active.
        """
        assert self._allocator is not None
        assert self.costs is not None
        return self._allocator.fitting(self.costs, chosen)

    def advance(self, chosen: Collection[int]) -> None:
        """Count one backward pass with the ``chosen`` modules active."""
        plan = self.plan(chosen)
        if plan is not None and self.costs is not None:
            self._compute += self.costs.flops(plan) / self.costs.flops(self.costs.all_active)

    def mean_compute(self, steps: int) -> float:
        """Return the FLOPs of the mean backward pass, as a share of one with all active."""
        return self._compute / max(steps, 1)

    def state(self) -> dict[str, Any]:
        """Return the values that a resumed run needs, without the costs."""
        return {"compute": self._compute}

    def check(self, state: Mapping[str, Any], chosen: Collection[int], modules: int) -> None:
        """Raise unless `load` can load the saved ``state``, and the choice fits its costs.

        Raises:
            ValueError: The costs are of other modules, or the choice exceeds the budget.
        """
        if state.get("costs") and self._allocator is not None:
            costs = Costs.from_state_dict(state["costs"])
            costs.check(modules=modules)
            self._allocator.fitting(costs, chosen)
            self._allocator.plan(costs, chosen)

    def load(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned, and the costs."""
        self._compute = state["compute"]
        self.costs = Costs.from_state_dict(state["costs"]) if state.get("costs") else None
