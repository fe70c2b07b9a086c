"""An optimizer under an allocation: what is in force, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynalora_optim._base.claims import claim
from dynalora_optim._costing import StepCosting
from dynalora_optim._driver import ModuleDriver
from dynalora_optim.allocation._allocation import Allocation
from dynalora_optim.allocation._context import Allocator
from dynalora_optim.allocation._record import AllocationRecord
from dynalora_optim.groups._module_group import ModuleGroup
from dynalora_optim.groups._rules import GroupRule, find_groups
from dynalora_optim.memory._report import MemoryReport, memory_report
from dynalora_optim.switching._gradients import drop_gradients
from dynalora_optim.update._late_bound import LateBoundOptimizer
from dynalora_optim.update._param_groups import ParameterIndex, ParamGroup, flatten
from dynalora_optim.update._plain import to_plain
from dynalora_optim.update._rates import LrTime
from dynalora_optim.update._updater import Updater


class AllocatedOptimizer(LateBoundOptimizer):
    """Puts the choice of its allocation into force, and shows it.

    `DynamicAllocationOptimizer` builds the parts and advances them.
    """

    _model: nn.Module
    _group_rule: GroupRule
    _allocation: Allocation
    _driver: ModuleDriver
    _costing: StepCosting
    _updater: Updater
    _frozen: frozenset[str]  # the names of groups that never train

    @property
    def groups(self) -> list[str]:
        """The names of the allocated module groups, in forward order."""
        return list(self._allocation.names)

    @property
    def active_groups(self) -> list[str]:
        """The names of the groups that are active now, in forward order."""
        return list(self._allocation.active_names())

    @property
    def active(self) -> float:
        """How many groups the next reallocation activates, as a count (int) or a share (float)."""
        return self._allocation.active

    @active.setter
    def active(self, active: float) -> None:
        self._allocation.active = active

    @property
    def allocator(self) -> Allocator:
        """Who chooses."""
        return self._allocation.allocator

    @property
    def lr_time(self) -> LrTime:
        """``"global"``, ``"local"``, or a `LocalLR`; settable before the first step."""
        return self._updater.rates.lr_time

    @lr_time.setter
    def lr_time(self, lr_time: LrTime) -> None:
        self._updater.rates.replace(lr_time, self._lines, self._allocation.steps)

    @property
    def record(self) -> AllocationRecord:
        """Every reallocation so far, with its step, the scores, and the groups chosen."""
        return self._allocation.record

    def _apply_allocation(self, *, probe: bool) -> None:
        everyone = self._allocation.everyone if probe else None
        self._driver.apply(self._allocation.choice, probe=everyone)
        self._drop_idle_gradients()
        idle = flatten(group for group in self.param_groups if not self._is_active(group))
        number = self._allocation.steps
        self._updater.settle(self.state, self.active_parameters(), idle, number=number)

    def _drop_idle_gradients(self) -> None:
        drop_gradients(flatten(g for g in self.param_groups if not self._is_active(g)))

    def _is_active(self, group: ParamGroup) -> bool:
        name = group["name"]
        return name not in self._frozen and self._allocation.is_active(name)

    @torch.no_grad()
    def _update_one(self, parameter: Tensor, position: int) -> None:
        """Move one parameter of the param group at ``position``, within the backward pass."""
        group, clock = self.param_groups[position], self._allocation
        if self._is_active(group):
            self._updater.update_one(
                parameter, group, self.param_groups, self._lines, state=self.state, clock=clock
            )

    def active_parameters(self) -> list[Tensor]:
        """Return the parameters that get gradients now, those outside all groups among them."""
        return flatten(group for group in self.param_groups if self._is_active(group))

    def hold(self, groups: Collection[str]) -> None:
        """Make just these ``groups`` active, and choose no others from here on.

        Args:
            groups: Names out of `groups`, at least one.

        Raises:
            ValueError: Unknown names, none, or more than a `Budget` can hold. Nothing is changed
                then.
        """
        self._allocation.hold(groups)
        self._apply_allocation(probe=False)

    def learning_rates(self) -> list[float]:
        """Return the rate that each of ``param_groups`` had at the last update, local ones too."""
        return [float(rate) for rate in self._updater.rates.last]

    def memory_report(self, *args: Any, **kwargs: Any) -> MemoryReport:
        """Return what a training step holds, now and with all modules active; print it as a table.

        Args:
            *args: What the model is called with. Its costs are measured for such a batch.
            **kwargs: As well. Without any, the report is on the batch that the `Budget` measured.

        Raises:
            RuntimeError: No batch is given and none has been measured, or the model is not in
                training mode.
            ValueError: The model has no blocks that can be told apart.
        """
        costs, plan = self._costing.current(args, kwargs)
        allocated = flatten(g for g in self.param_groups if g["name"] in self._allocation.updates)
        return memory_report(
            (costs, plan, self._costing.block_names),
            weights=list(self._model.parameters()),
            adapters=allocated,
            trained=[p for p in flatten(self.param_groups) if p.requires_grad],
            state=self.state,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, split per module group as those given at construction.

        Its parameters may belong to modules adapted since: these join the allocation as new groups.
        They are active at once where all others are; else a selection is made after this step.

        Raises:
            ValueError: A parameter is not the model's, or is held already. Nothing is changed then.
        """
        parameters = self._check_new(param_group)
        if hasattr(self, "_driver"):  # not while torch's constructor adds the first ones
            self._adopt_new_groups(parameters)
        super().add_param_group({**param_group, "params": parameters})
        self._updater.attach(self.param_groups, self._update_one)

    def _adopt_new_groups(self, parameters: Sequence[Tensor]) -> None:
        found = find_groups(self._model, self._group_rule)
        index = ParameterIndex(self._model, found)
        index.check_belongs(parameters)
        self._driver.check_same(index.groups_of(parameters))
        known = {group["name"] for group in self.param_groups}
        new = [
            group
            for group in index.groups_of(parameters)
            if group.role == "allocated" and group.name not in known
        ]
        layout = self._driver.layout_with(new)
        self._allocation.extend([g.name for g in new], [g.name for g in found], layout)
        self._index = index
        self._driver.add(new)
        claim(self, (module for group in new for module in group.modules))
        self._apply_allocation(probe=self._driver.is_probing)

    def driven_groups(self) -> list[ModuleGroup]:
        """Return the groups that this object makes active and inactive."""
        return self._driver.groups()

    def plain_state_dict(self) -> dict[str, Any]:
        """Return what the wrapped optimizer's own ``load_state_dict`` takes.

        Its groups and their parameters are those that it was given, in that order. Modules that
        were never active have no state in it, as parameters without a gradient have none.

        Raises:
            ValueError: Groups that were split from one of yours have come to differ in an option,
                such as a rate that was set for one module.
        """
        self._updater.wait()
        state = {} if self._is_provisional else self.state
        return to_plain(self.param_groups, self._lines, self._users, state)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self._rule.optimizer).__name__}, "
            f"{len(self.active_groups)} of {len(self.groups)} groups active after "
            f"{self._allocation.steps} steps)"
        )
