"""All that the optimizer does to the modules of its model: watch them, and open and close them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import filterfalse
from typing import Any

import torch
from torch import Tensor, nn

from dynalora_optim._base.claims import is_claimed
from dynalora_optim._base.collectives import (
    agreed,
    check_agreement,
    differs,
    is_sharded,
    largest,
    world_size,
)
from dynalora_optim._base.trees import elements
from dynalora_optim.allocation._allocation import Allocation
from dynalora_optim.allocation._costs import Costs, Plan
from dynalora_optim.groups._groups import ModuleGroup
from dynalora_optim.importance._tracker import ImportanceTracker
from dynalora_optim.memory._shaping import Shaper
from dynalora_optim.switching._anchor import Anchor
from dynalora_optim.switching._freezing import Freezer, drop_copied_hooks
from dynalora_optim.switching._probe import GradientProbe

logger = logging.getLogger(__name__)


class ModuleDriver:
    """Keeps the chosen groups active, the backward graph in shape, and the tracker informed."""

    def __init__(
        self,
        shaper: Shaper,
        groups: Sequence[ModuleGroup],
        tracker: ImportanceTracker,
        allocation: Allocation,
        frozen: Sequence[ModuleGroup] = (),
        *,
        checkpoint_idle: bool = False,
    ) -> None:
        self.is_closed = False
        self._groups: dict[str, ModuleGroup] = {}
        self._frozen = frozen
        self._checkpoint_idle = checkpoint_idle
        self._tracker = tracker
        self._allocation = allocation
        self._shaper = shaper
        self._freezer = Freezer(self._checkpointed)
        self._probe = GradientProbe(shaper.model, self._freezer, tracker)
        self._anchor = Anchor()
        self._is_measuring = False
        self._has_parted = False  # from the other ranks
        self._largest = 0  # elements of the largest batch on this rank
        self._largest_of_all = 0  # and on any, as far as all ranks know
        self.add(groups)
        self._freezer.set_flags(frozen, ())

    def attach(self) -> None:
        """Set the hooks of the model as a whole."""
        self._shaper.attach(self)

    def add(self, groups: Sequence[ModuleGroup]) -> None:
        """Take ``groups`` into care; they stay active until `apply` says otherwise."""
        for module in filterfalse(is_claimed, self._shaper.model.modules()):
            drop_copied_hooks(module)
        self._groups.update((group.name, group) for group in groups)
        self._tracker.attach(groups)
        self._anchor.attach(groups)

    def check_same(self, groups: Iterable[ModuleGroup]) -> None:
        """Raise if one of ``groups`` has the name of one in care, but other modules.

        Raises:
            ValueError: The modules in care have left the model, or a rule names more of them.
        """
        for group in groups:
            known = self._groups.get(group.name, group)
            if known.modules != group.modules:
                raise ValueError(
                    f"group {group.name!r} has other modules than those that this optimizer "
                    "drives under that name, which it would go on to drive; close() it and build "
                    "a new DynamicAllocationOptimizer."
                )

    def check_held(self, parameters: Iterable[Tensor]) -> None:
        """Raise unless each group has some of ``parameters``, those that the optimizer updates.

        Raises:
            RuntimeError: Since the optimizer was built, other parameters were put into one of them.
        """
        held = set(map(id, parameters))
        for group in self._groups.values():
            if held.isdisjoint(map(id, group.parameters())):
                raise RuntimeError(
                    f"the optimizer no longer holds the parameters of {group.name}. fully_shard "
                    "replaces them: call it before the optimizer is built, or leave it to "
                    "accelerator.prepare(model, optimizer). DeepSpeed ZeRO flattens them into "
                    "tensors that belong to no module, so that none could be left out: use DDP or "
                    "FSDP2 (fully_shard) instead."
                )

    def modules(self) -> Iterator[nn.Module]:
        """Yield the modules in care."""
        groups = [*self._groups.values(), *self._frozen]
        return (module for group in groups for module in group.modules)

    @property
    def is_probing(self) -> bool:
        """Whether the next backward pass gives all modules a gradient."""
        return self._probe.is_waiting

    def apply(self, chosen: Collection[str], *, probe: bool = False) -> None:
        """Make the ``chosen`` groups active and the rest inactive, after one probe if asked."""
        self._probe.close()
        groups = list(self._groups.values())
        self._freezer.set_active(groups, chosen)
        self._freezer.set_gated(groups, self._shaper.gated(groups, chosen))
        if world_size() == 1:  # else DDP waits for these too
            self._freezer.set_gated(self._frozen, ())
        if not self.is_closed:
            self._anchor.move(
                next(group for group in reversed(groups) if group.name in chosen),
                [*self._frozen, *(group for group in groups if group.name not in chosen)],
            )
        if probe:
            self._probe.open(groups, chosen)

    def _checkpointed(self, active: Collection[str]) -> list[nn.Module]:
        """The blocks to checkpoint while these groups are active."""
        if self._checkpoint_idle:
            return self._shaper.idle_blocks(
                group for name, group in self._groups.items() if name not in active
            )
        plan = self._allocation.plan(active)
        return [self._shaper.blocks[b].module for b in plan.checkpointed] if plan else []

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure a training batch that is larger than any before, and fit the choice to it."""
        if self._is_measuring or not self._allocation.has_budget:
            return
        self._largest = max(self._largest, elements(args, kwargs))
        # Several ranks measure together, and so only when all know of it: see `agree`.
        outgrown = self._largest_of_all if world_size() > 1 else self._largest
        if not self._allocation.is_unmeasured(outgrown):
            return
        is_probing = self.is_probing
        try:
            costs = agreed(self.measure(args, kwargs), key=lambda costs: costs.batch)
            if costs.flops(costs.all_active):  # nothing can be told from a batch without rows
                self._allocation.take_costs(costs)
        finally:
            self.apply(self._allocation.chosen, probe=is_probing)

    def agree(self, settings: object) -> None:
        """Raise unless all ranks have these ``settings``; share the largest batch seen.

        Raises:
            RuntimeError: The ranks disagree.
        """
        self._freezer.give_back()
        check_agreement("the allocation", settings, self.device)
        if self._allocation.has_budget:
            self._largest_of_all = largest(self._largest, self.device)

    def watch_synchronization(self, chosen: Collection[str]) -> None:
        """Warn, once, if the ranks have come to different weights in the ``chosen`` groups."""
        parameters = list(self._groups[min(chosen)].parameters())
        if self._has_parted or world_size() == 1 or any(map(is_sharded, parameters)):
            return
        self._has_parted = differs(
            torch.stack([p.detach().float().sum() for p in parameters]).sum()
        )
        if self._has_parted:
            logger.warning(
                "the ranks have different weights: nothing averages their gradients. Wrap the "
                "model in DistributedDataParallel, or prepare it with Accelerate. (Calling "
                "Trainer.evaluate() before Trainer.train() keeps the Trainer from doing so; pass "
                "eval_on_start=True instead.)"
            )

    def measure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Costs:
        """Return what every choice costs for this batch; the caller then calls `apply`."""
        self._is_measuring = True
        self._probe.close()
        groups = [self._groups[name] for name in self._allocation.names]
        try:
            with self._tracker.paused():
                return self._shaper.measure(groups, self._freezer, args, kwargs)
        finally:
            self._is_measuring = False

    def current_costs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Costs, Plan]:
        """Return the costs of this batch, or of the one measured, and the choice in force.

        Raises:
            RuntimeError: There is neither, or the model is not in training mode.
        """
        costs = self._allocation.costs
        if args or kwargs:
            if not self._shaper.model.training:
                raise RuntimeError("memory_report() is on training steps: call model.train().")
            is_probing = self.is_probing
            try:
                costs = self.measure(args, kwargs)
            finally:
                self.apply(self._allocation.chosen, probe=is_probing)
        if costs is None:
            raise RuntimeError(
                "memory_report() has no batch: none was measured so far. Pass one as the model "
                "takes it, such as memory_report(**batch)."
            )
        return costs, self._allocation.current_plan(costs)

    @property
    def block_names(self) -> list[str]:
        """The dotted paths of the model's blocks."""
        return [block.name for block in self._shaper.blocks]

    def before_update(self, chosen: Collection[str]) -> None:
        """Read what the backward passes left, before an optimizer step uses it."""
        self._freezer.give_back()
        self._probe.close()
        self._tracker.observe_step(g for name, g in self._groups.items() if name in chosen)
        self._tracker.share(self.device)

    @property
    def device(self) -> torch.device:
        """Where the allocated parameters are."""
        return next(p for group in self._groups.values() for p in group.parameters()).device

    def close(self) -> None:
        """Make every module active again and remove all hooks; once, for others may follow."""
        if self.is_closed:
            return
        self.is_closed = True
        self._probe.close()
        self._freezer.close([*self._groups.values(), *self._frozen])
        self._anchor.remove()
        self._shaper.close()
        self._tracker.close()
