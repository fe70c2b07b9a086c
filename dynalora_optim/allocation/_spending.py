"""The measured costs of all choices, and the compute that the run has used so far."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dynalora_optim.allocation._context import Allocator, CostAware
from dynalora_optim.allocation._costs import Costs, Plan
from dynalora_optim.allocation._saved_costs import restored_costs


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
        self._step = 0, 0  # FLOPs of this step's backward passes: planned, with all modules active

    @property
    def is_asked_for(self) -> bool:
        """Whether the allocator decides from measured costs."""
        return self._allocator is not None

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

    def fitting(self, costs: Costs, chosen: Collection[int]) -> Collection[int]:
        """Return those of the ``chosen`` modules that can stay active at these ``costs``.

        Raises:
            ValueError: No module can stay active.
        """
        assert self._allocator is not None
        return self._allocator.fitting(costs, chosen)

    def count_forward(self, flops: int, of_all: int) -> None:
        """Count the FLOPs of the backward of a forward, and what they are with all active."""
        self._step = self._step[0] + flops, self._step[1] + of_all

    def advance(self, chosen: Collection[int]) -> None:
        """Count one step, in which the ``chosen`` modules were active."""
        flops, of_all = self._step
        if not of_all and self.costs is not None:  # its forwards were not seen
            plan = self.plan(chosen)
            flops = self.costs.flops(plan) if plan else 0
            of_all = self.costs.flops(self.costs.all_active)
        self._compute += flops / of_all if of_all else 0.0
        self._step = 0, 0

    def mean_compute(self, steps: int) -> float:
        """Return the FLOPs of the mean backward pass, as a share of one with all active."""
        return self._compute / max(steps, 1)

    def state(self) -> dict[str, Any]:
        """Return the values that a resumed run needs, without the costs."""
        return {"compute": self._compute, "step_flops": list(self._step)}

    def check(self, state: Mapping[str, Any], chosen: Collection[int], modules: int) -> None:
        """Raise unless `load` can load the saved ``state``, and the choice fits its costs.

        Raises:
            ValueError: The costs are of other modules, or the choice exceeds the budget.
        """
        if state.get("costs") and self._allocator is not None:
            costs = restored_costs(state["costs"], modules=modules)
            self._allocator.fitting(costs, chosen)
            self._allocator.plan(costs, chosen)

    def load(self, state: Mapping[str, Any], modules: int) -> None:
        """Load what `state` returned, and the costs."""
        self._compute = state["compute"]
        flops, of_all = state["step_flops"]
        self._step = flops, of_all
        costs = state.get("costs")
        self.costs = restored_costs(costs, modules=modules) if costs else None
