"""An optimizer with an allocation: it applies the current choice, and shows it to the user."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynalora_optim._base.claims import claim
from dynalora_optim._costing import StepCosting
from dynalora_optim._driver import ModuleDriver
from dynalora_optim._grouping import Joining
from dynalora_optim._holdings import total_of
from dynalora_optim.allocation._allocation import Allocation
from dynalora_optim.allocation._context import Allocator
from dynalora_optim.allocation._record import AllocationRecord
from dynalora_optim.groups._module_group import ModuleGroup
from dynalora_optim.groups._rules import GroupRule
from dynalora_optim.memory._report import MemoryReport, memory_report
from dynalora_optim.switching._detach import ActiveCopies
from dynalora_optim.switching._gradients import drop_gradients
from dynalora_optim.update._late_bound import LateBoundOptimizer
from dynalora_optim.update._param_groups import PACKED, ParamGroup, flatten
from dynalora_optim.update._plain import check_alike
from dynalora_optim.update._rates import LrTime
from dynalora_optim.update._updater import Updater


class AllocatedOptimizer(LateBoundOptimizer):
    """Applies the choice of its allocation, and shows it.

    The subclass `DynamicAllocationOptimizer` builds the parts, and runs them at each step.
    """

    _model: nn.Module
    _group_rule: GroupRule
    _allocation: Allocation
    _driver: ModuleDriver
    _costing: StepCosting
    _updater: Updater
    _waiting: Sequence[ModuleGroup]  # frozen so far
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
        """The allocator, which chooses the active groups."""
        return self._allocation.allocator

    @property
    def lr_time(self) -> LrTime:
        """``"global"``, ``"local"``, or a `LocalLR`; set ``"local"`` before the first step."""
        return self._updater.rates.lr_time

    @lr_time.setter
    def lr_time(self, lr_time: LrTime) -> None:
        self._updater.rates.replace(lr_time, self.param_groups, self._allocation.steps)

    @property
    def record(self) -> AllocationRecord:
        """Every reallocation so far, with its step, the scores, and the chosen groups."""
        return self._allocation.record

    def _apply_allocation(self, *, probe: bool) -> None:
        everyone = self._allocation.everyone if probe else None
        self._driver.apply(self._allocation.choice, probe=everyone)
        self._drop_idle_gradients()
        idle = self._parameters_of(lambda name: not self._is_active_name(name))
        number = self._allocation.steps
        self._updater.settle(self.state, self.active_parameters(), idle, number=number)

    def _drop_idle_gradients(self) -> None:
        drop_gradients(self._parameters_of(lambda name: not self._is_active_name(name)))

    def _parameters_of(self, wanted: Callable[[str], bool]) -> list[Tensor]:
        """Return the parameters of the module groups whose names are ``wanted``."""
        return [
            self.param_groups[part.line]["params"][position]
            for part in self._parts()
            if wanted(part.name)
            for position in part.positions
        ]

    def _is_active(self, piece: ParamGroup) -> bool:
        return self._is_active_name(piece["name"])

    def _is_active_name(self, name: str) -> bool:
        return name not in self._frozen and self._allocation.is_active(name)

    @torch.no_grad()
    def _receive(self, parameter: Tensor, position: int, *, now: bool) -> ParamGroup | None:
        """Update a parameter of the piece at ``position``, if active; see `Receive`."""
        part = self._parts()[position]
        if not self._is_active_name(part.name):
            return None
        if now:
            piece = self._pieces.piece(self.param_groups, part)
            self._updater.update_one(parameter, piece, state=self.state, clock=self._allocation)
        return self.param_groups[part.line]

    def active_parameters(self) -> list[Tensor]:
        """Return the parameters that get gradients now, including those outside all groups."""
        return self._parameters_of(self._is_active_name)

    def trained_parameters(self) -> list[Tensor]:
        """Return the parameters that may ever be updated."""
        found = self._parameters_of(lambda name: name not in self._frozen)
        return [parameter for parameter in found if parameter.requires_grad]

    def hold(self, groups: Collection[str]) -> None:
        """Make only these ``groups`` active, and never choose again.

        Args:
            groups: One or more of the names in the property `groups`.

        Raises:
            ValueError: A name is unknown, no name is given, or a `Budget` cannot hold the groups.
                Then nothing is changed.
        """
        self._allocation.hold(groups)
        self._apply_allocation(probe=False)

    def learning_rates(self) -> list[float]:
        """Return the learning rate that each of `module_groups` used at its last update.

        It is nan before the first update since the start or `load_state_dict`, and for an optimizer
        that computes its own rates.
        """
        last = self._updater.rates.last
        rates = [last.get((part.line, part.name)) for part in self._parts()]
        return [math.nan if rate is None else float(rate) for rate in rates]

    def measure(self, *args: Any, **kwargs: Any) -> None:
        """Measure the costs of a batch before training, for an allocator that decides by costs.

        Without it, the costs are measured on the first batch, and again on each larger one. A share
        such as ``Budget(memory=0.4)`` is of the largest batch so far. So if your rows differ in
        length, call this with the largest batch: a budget that cannot hold it is refused now, and
        the share is of this batch from the first step on. Weights, gradients and random numbers do
        not change. With another allocator nothing happens.

        Call it in the autocast context of the training loop, and with several processes on each of
        them.

        Args:
            *args: The positional arguments of the model for the batch.
            **kwargs: Its keyword arguments.

        Raises:
            RuntimeError: The model is not in training mode.
            ValueError: The budget cannot hold a step with this batch, or the costs of the model
                cannot be measured.
        """
        self._costing.prepare(args, kwargs)

    def memory_report(self, *args: Any, **kwargs: Any) -> MemoryReport:
        """Return the memory of a training step, now and with all modules active.

        ``print()`` shows the report as a table.

        Args:
            *args: The positional arguments of the model for a batch, on which costs are measured.
            **kwargs: The keyword arguments of the model for this batch. Without any arguments, the
                report uses the costs that the `Budget` has measured.

        Raises:
            RuntimeError: No batch is given and none has been measured, or the model is not in
                training mode.
            ValueError: The model has no blocks, or blocks that cannot be measured one by one.
        """
        costs, plan = self._costing.current(args, kwargs)
        total = total_of(self.allocator)
        allocated = self._parameters_of(self._allocation.updates.__contains__)
        return memory_report(
            (costs, plan, self._costing.block_names(costs)),
            weights=list(self._model.parameters()),
            adapters=allocated,
            trained=[p for p in flatten(self.param_groups) if p.requires_grad],
            state=self.state,
            total=costs.loop.resident.capacity if isinstance(total, str) else total,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to those of the wrapped optimizer.

        Its parameters may belong to modules that were adapted after the optimizer was built. These
        join the allocation as new groups. If all groups are active, the new ones are active at
        once. If not, a selection is made after the next step.

        Raises:
            ValueError: A parameter is not in the model, or another param group holds it. Then
                nothing is changed.
        """
        if not self._is_linked:  # torch's constructor adds the first ones
            super().add_param_group(param_group)
            return
        if not isinstance(params := param_group["params"], Tensor):  # a generator is read once
            param_group = {**param_group, "params": list(params)}
        self._updater.rates.check([*self.param_groups, {**self.defaults, **param_group}])
        self._adopt(self._joining(self._check_new(param_group)))
        super().add_param_group(param_group)
        self._updater.attach(self.module_groups, self._receive)

    def _joining(self, parameters: Sequence[Tensor]) -> Joining:
        """Return what joins with ``parameters``; nothing is changed.

        Raises:
            ValueError: A parameter is not in the model, or its group has other modules now.
        """
        known = {part.name for part in self._parts()} - {group.name for group in self._waiting}
        held = flatten(self.param_groups)
        joining = Joining.of(self._model, self._group_rule, held, parameters, known)
        self._driver.check_same(joining.groups)
        return joining

    def _adopt(self, joining: Joining) -> None:
        layout = self._driver.layout_with(joining.new)
        self._allocation.extend(joining.names, joining.order, layout)
        self._pieces.index = joining.index
        self._driver.add(joining.new)
        self._driver.replace(g for g in joining.groups if g.name in self._allocation.updates)
        self._waiting = [group for group in self._waiting if group.name not in joining.names]
        modules = [module for group in joining.new for module in group.modules]
        claim(self, modules)
        for module in modules:
            ActiveCopies.of(module)
        self._apply_allocation(probe=self._driver.is_probing)

    def _join_unfrozen(self) -> None:
        """Let groups join that were frozen so far, and train now."""
        ready = [group for group in self._waiting if not group.is_frozen]
        if found := self._held_of(ready):
            self._adopt(self._joining(found))

    def _held_of(self, groups: Iterable[ModuleGroup]) -> list[Tensor]:
        held = set(map(id, flatten(self.param_groups)))
        return [p for group in groups for p in group.parameters() if id(p) in held]

    def driven_groups(self) -> list[ModuleGroup]:
        """Return the groups that this object makes active and inactive."""
        return self._driver.groups()

    def plain_state_dict(self) -> dict[str, Any]:
        """Return a state dict for the wrapped optimizer's own ``load_state_dict``.

        It has the user's param groups with their parameters, in the user's order. Modules that were
        never active have no state in it, like parameters that never had a gradient.

        Raises:
            ValueError: The wrapped optimizer counts updates in its param groups, and modules of one
                group have had different numbers of them.
        """
        self._follow()
        self._updater.wait()
        lines = range(len(self.param_groups))
        own = [self._pieces.own_numbers(self.param_groups, line) for line in lines]
        check_alike(self.param_groups, own)
        state = {} if self._is_provisional else self.state
        packed = self._rule.state_dict(self.param_groups, state)
        for group in packed["param_groups"]:
            group.pop(PACKED, None)
        return packed

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self._rule.optimizer).__name__}, "
            f"{len(self.active_groups)} of {len(self.groups)} groups active after "
            f"{self._allocation.steps} steps)"
        )
