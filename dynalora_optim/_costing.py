"""Measuring the costs of choices before the first step that needs them, and on all ranks."""

from __future__ import annotations

from typing import Any

from torch.utils.hooks import RemovableHandle

from dynalora_optim._base.collectives import agreed, largest, world_size
from dynalora_optim._base.trees import elements
from dynalora_optim._driver import ModuleDriver
from dynalora_optim.allocation._allocation import Allocation
from dynalora_optim.allocation._costs import Costs, Plan
from dynalora_optim.importance._tracker import ImportanceTracker
from dynalora_optim.memory._announce import announce
from dynalora_optim.memory._block_meter import BlockMeter


class StepCosting:
    """Measures costs on training batches, for an allocator that decides by costs."""

    def __init__(
        self,
        meter: BlockMeter,
        allocation: Allocation,
        driver: ModuleDriver,
        tracker: ImportanceTracker,
    ) -> None:
        self._meter = meter
        self._allocation = allocation
        self._driver = driver
        self._tracker = tracker
        self._handle: RemovableHandle | None = None
        self._is_measuring = False
        self._largest = 0  # elements of the largest batch on this rank
        self._largest_of_all = 0  # the same over all ranks, when they last shared it

    def attach(self) -> None:
        """Listen to each training forward, if the allocation needs costs."""
        self.close()
        if self._allocation.needs_costs:
            self._handle = announce(self._meter.model, self)

    def close(self) -> None:
        """Stop listening to forwards."""
        if self._handle:
            self._handle.remove()
        self._handle = None

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure a training batch that is larger than all before, and fit the choice to it."""
        if self._is_measuring:
            return
        self._largest = max(self._largest, elements(args, kwargs))
        # Several ranks measure together, so that all must know the size first: see `share_largest`.
        outgrown = self._largest_of_all if world_size() > 1 else self._largest
        if not self._allocation.is_unmeasured(outgrown):
            return
        is_probing = self._driver.is_probing
        try:
            costs = agreed(self.measure(args, kwargs), key=lambda costs: costs.batch)
            if costs.flops(costs.all_active):  # a batch without rows has no costs
                self._allocation.take_costs(costs)
        finally:
            self._resume(is_probing)

    def share_largest(self) -> None:
        """Share the size of the largest batch with all ranks, if the allocation needs costs."""
        if self._allocation.needs_costs:
            self._largest_of_all = largest(self._largest, self._driver.device)

    def measure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Costs:
        """Return the costs of every choice for this batch; the caller then applies the choice."""
        self._is_measuring = True
        self._driver.close_probe()
        groups = [self._driver.group(name) for name in self._allocation.names]
        try:
            with self._tracker.paused():
                return self._meter.measure(groups, self._driver.switch, args, kwargs)
        finally:
            self._is_measuring = False

    def current(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Costs, Plan]:
        """Return the costs of this batch, or else the costs already measured, and the current plan.

        Raises:
            RuntimeError: There are no costs and no batch, or the model is not in training mode.
        """
        costs = self._allocation.costs
        if args or kwargs:
            if not self._meter.model.training:
                raise RuntimeError("memory_report() measures training: call model.train() first.")
            is_probing = self._driver.is_probing
            try:
                costs = self.measure(args, kwargs)
            finally:
                self._resume(is_probing)
        if costs is None:
            raise RuntimeError(
                "memory_report() has no batch, and none was measured so far. Pass a batch as you "
                "pass it to the model, such as memory_report(**batch)."
            )
        return costs, self._allocation.current_plan(costs)

    @property
    def block_names(self) -> list[str]:
        """The dotted paths of the model's blocks."""
        return [block.name for block in self._meter.blocks]

    def _resume(self, is_probing: bool) -> None:
        probe = self._allocation.everyone if is_probing else None
        self._driver.apply(self._allocation.choice, probe=probe)
