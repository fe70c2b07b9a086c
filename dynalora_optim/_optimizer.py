"""`DynamicAllocationOptimizer`: the clock, the delegation and the state of a run."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynalora_optim._base.claims import claim, release
from dynalora_optim._base.collectives import check_agreement
from dynalora_optim._driver import ModuleDriver
from dynalora_optim.allocation._allocation import Allocation
from dynalora_optim.allocation._allocators import Allocator, as_allocator
from dynalora_optim.allocation._record import AllocationRecord
from dynalora_optim.allocation._schedules import Schedule, as_schedule
from dynalora_optim.groups._groups import GroupRule, find_groups
from dynalora_optim.importance._measures import GradientMeasure, ImportanceMeasure
from dynalora_optim.importance._tracker import ImportanceTracker, as_tracker
from dynalora_optim.memory._report import MemoryReport, memory_report
from dynalora_optim.memory._shaping import Shaper
from dynalora_optim.state._pack import pack, unpack
from dynalora_optim.state._placeholders import (
    OnActivate,
    add_placeholders,
    check_on_activate,
    is_rehearsal,
    reset,
)
from dynalora_optim.state._validate import check_keys, check_values, damage_refused
from dynalora_optim.switching._freezing import drop_gradients
from dynalora_optim.update._fused import FusedBackward, refusal
from dynalora_optim.update._idle_state import as_idle_state
from dynalora_optim.update._master_weights import (
    MasterWeights,
    Rounding,
    check_master_weights,
    restore_dtypes,
)
from dynalora_optim.update._param_groups import (
    ParameterIndex,
    ParamGroup,
    flatten,
    match_always_active,
)
from dynalora_optim.update._plain import from_plain, is_plain, to_plain
from dynalora_optim.update._rates import LocalLR, LrTime, Rates
from dynalora_optim.update._rule import LateBoundOptimizer, check_wrappable


class DynamicAllocationOptimizer(LateBoundOptimizer):
    """Wraps a torch optimizer and decides every period which modules get gradients (DynaLoRA).

    It is a ``torch.optim.Optimizer`` and takes the wrapped one's place everywhere: in the loop, in
    LR schedulers, in ``GradScaler``, in ``accelerator.prepare``. It owns the ``param_groups`` (the
    user's, split per module group) and the ``state`` (created the first time a module is active);
    the wrapped optimizer is the update rule. With all groups active it is that optimizer, bit for
    bit.

    An inactive module's forward uses detached parameters: its output is unchanged, its ``grad`` is
    None, and neither momentum nor weight decay moves it. Parameters in no module group, such as a
    classification head, are always active.

    Args:
        optimizer: Any per-parameter torch optimizer over the model's parameters. Its state, if it
            has some, is taken over. Use the wrapper in its place from here on.
        model: The adapted model. Its parameters must be those of ``optimizer``.
        active: How many module groups are active at a time: a count (int), or a share (float) in
            (0, 1]. Settable at any time; it holds from the next reallocation on.
        period: Reallocate after every so many optimizer steps; or a schedule such as
            ``Once(at=200)``.
        importance: ``"forward"`` (equation 1, p=2), ``"gradient"``, ``"sensitivity"``, a measure
            such as ``ForwardNorm(p=1)``, or an `ImportanceTracker` with options of its own.
        allocator: ``"discounted"`` (equation 3), ``"topk"``, ``"threshold"``, ``"stochastic"``,
            ``"random"``, ``"round_robin"``, or an allocator object.
        groups: ``"auto"`` finds our adapters and peft's; ``"blocks"``, or `Blocks` with options,
            trains all parameters of the model's repeated blocks; or a callable
            ``(name, module) -> group name or None``.
        always_active: Names of module groups, or patterns with ``*``, that are never inactive.
        seed: The seed of the allocator's private random numbers.
        warmup: All modules are active for so many optimizer steps; then the schedule begins.
        max_idle_periods: No module is left out by more selections in a row, whatever the allocator.
        lr_time: ``"global"``: all modules follow the LR scheduler's clock. ``"local"``: at its
            u-th update a module uses the rate that the scheduler had at step u. A `LocalLR`: a
            function of the module's own updates, without a scheduler.
        activation_warmup: After a pause a module's rate rises over so many steps, 1/n, 2/n, ... 1.
        on_activate: What becomes of the optimizer state of a module that returns from a pause:
            ``"keep"``, ``"reset_momentum"`` (the first moment only), or ``"reset"``.
        idle_state: What becomes of it meanwhile: ``"keep"``; ``"offload"``: it goes to the host and
            comes back unchanged; or ``"drop"``: it is deleted.
        master_weights: Train bfloat16 (or float16) weights on float32 copies, which exist while
            their module is active; afterwards the weights are the ``"nearest"``, or rounded in a
            ``"stochastic"`` way that keeps the mean.
        fused_backward: Update each parameter within the backward pass and free its gradient at
            once. Not for loops that clip, scale or accumulate gradients; those are found out in
            the first step, which is an ordinary one.
        checkpoint_idle: Recompute the blocks that hold no active module, rather than keep what
            their gradients need.

    Attributes:
        tracker: The `ImportanceTracker`: ``tracker.scores()`` at any time.

    Raises:
        TypeError: An argument of another kind.
        ValueError: An argument out of range, a model without adapters, or an optimizer that does
            not hold the adapters. Nothing is changed then.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4)  # doctest: +SKIP
        >>> optimizer = DynamicAllocationOptimizer(optimizer, model, active=16, period=50)

    Source: "Dynamic Low-Rank Module Allocation" (DynaLoRA), sections 3.1 to 3.4.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        active: float = 2 / 3,
        period: int | Schedule = 50,
        importance: str | ImportanceMeasure | ImportanceTracker = "forward",
        allocator: str | Allocator = "discounted",
        groups: GroupRule = "auto",
        always_active: Sequence[str] = (),
        seed: int = 0,
        warmup: int = 0,
        max_idle_periods: int | None = None,
        lr_time: LrTime = "global",
        activation_warmup: int = 0,
        on_activate: OnActivate = "keep",
        idle_state: Literal["keep", "offload", "drop"] = "keep",
        master_weights: Rounding | None = None,
        fused_backward: bool = False,
        checkpoint_idle: bool = False,
    ) -> None:
        has_local_schedule = isinstance(lr_time, LocalLR) and lr_time.is_from_scheduler
        check_wrappable(optimizer, scheduled=has_local_schedule)
        check_on_activate(on_activate, optimizer)
        found = find_groups(model, groups)
        parameters = flatten(optimizer.param_groups)
        index = ParameterIndex(model, found)
        index.check_belongs(parameters)
        exempt = match_always_active(always_active, found)
        index.check_groups(parameters, named=exempt)
        found = [group for group in found if group.name not in exempt]
        allocated = [group for group in found if group.fate == "allocated"]
        frozen = [group for group in found if group.fate == "frozen"]
        check_master_weights(master_weights, optimizer, parameters)
        self._idle_state = as_idle_state(idle_state, optimizer)
        self._allocation = Allocation(
            [group.name for group in allocated],
            active=active,
            allocator=as_allocator(allocator),
            schedule=as_schedule(period),
            seed=seed,
            warmup=warmup,
            max_idle_periods=max_idle_periods,
        )
        shaper = Shaper(
            model,
            allocated,
            has_budget=self._allocation.has_budget,
            checkpoint_idle=checkpoint_idle,
        )
        self._rates = Rates(lr_time, activation_warmup)
        self._rates.check([i for i, g in enumerate(optimizer.param_groups) for _ in index.split(g)])
        self._on_activate = on_activate
        self._has_agreed = False  # with the other ranks, in this process
        self.tracker = as_tracker(importance)
        self.tracker.check(allocated)
        if fused_backward and isinstance(self.tracker.measure, GradientMeasure):
            raise ValueError(refusal("importance= measures gradients at step()"))
        # Nothing outside this object has changed so far; nothing below raises.
        self._model, self._group_rule = model, groups
        self._masters = MasterWeights(master_weights, seed)
        self._frozen = frozenset(group.name for group in frozen)
        super().__init__(optimizer, index, self._masters)
        self._driver = ModuleDriver(
            shaper,
            allocated,
            self.tracker,
            self._allocation,
            frozen,
            checkpoint_idle=checkpoint_idle,
        )
        self._fused = FusedBackward() if fused_backward else None
        self._take_charge()
        self._apply_allocation(probe=self.tracker.probe)

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
        """How many groups the next reallocation activates: a count (int) or a share (float)."""
        return self._allocation.active

    @active.setter
    def active(self, active: float) -> None:
        self._allocation.active = active

    @property
    def lr_time(self) -> LrTime:
        """``"global"``, ``"local"``, or a `LocalLR`; settable before the first step."""
        return self._rates.lr_time

    @lr_time.setter
    def lr_time(self, lr_time: LrTime) -> None:
        rates = Rates(lr_time, self._rates.activation_warmup)
        rates.check(self._lines)
        if self._allocation.steps and lr_time == "local":
            raise ValueError(
                f"lr_time='local' replays the schedule from its first step, but "
                f"{self._allocation.steps} steps are done; set it before, or use a LocalLR."
            )
        self._rates = rates

    @property
    def record(self) -> AllocationRecord:
        """Every reallocation so far: step, scores, chosen."""
        return self._allocation.record

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the active groups, then reallocate if the schedule says so.

        Args:
            closure: Reevaluates the model and returns the loss; called once.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: After `close`, or the ranks that train together disagree.
        """
        if self._driver.is_closed:
            raise RuntimeError("step() after close(): build a new DynamicAllocationOptimizer.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._has_agreed:
            self._driver.check_held(flatten(self.param_groups))
        if is_rehearsal(self.param_groups, self.state):  # torch.distributed.checkpoint
            self._rehearse()
            return loss
        self._drop_provisional()
        self._check_in_order()
        self._driver.before_update(self._allocation.chosen)
        self._drop_idle_gradients()  # frozen means unmoved, whatever put a gradient there
        due = self._allocation.advance(self._update())
        if self._allocation.may_differ_between_ranks:
            check_agreement("whether to reallocate now", due, self._driver.device)
        self.tracker.end_step(self._allocation.steps)
        if due:
            self._reallocate()
        return loss

    def _update(self) -> set[str]:
        """Move the active groups; return the names of those that had a gradient."""
        active = [group for group in self.param_groups if self._is_active(group)]
        moved = {p for p in flatten(active) if p.grad is not None}
        if self._fused and moved and not self._fused.is_rehearsed:
            self._fused.check()
            self._check_fusible(active)
        with self._rates.applied(self.param_groups, self._lines, self._allocation):
            self._rule.step(active, self.state)
        if self._fused:
            moved |= self._fused.end_step()
        return {group["name"] for group in active if not moved.isdisjoint(group["params"])}

    @torch.no_grad()
    def _update_one(self, parameter: Tensor, position: int) -> None:
        """Move one parameter of the param group at ``position``, within the backward pass."""
        group = self.param_groups[position]
        if self._is_active(group):
            with self._rates.applied(self.param_groups, self._lines, self._allocation):
                self._rule.step([{**group, "params": [parameter]}], self.state)

    def _check_fusible(self, groups: Sequence[ParamGroup]) -> None:
        """Try the rule on a copy of one parameter: it may not add up anything over several."""
        pairs = [(p, group) for group in groups for p in group["params"] if p.grad is not None]
        parameter, group = min(pairs, key=lambda pair: pair[0].numel())
        copy = parameter.detach().clone()
        copy.grad = deepcopy(parameter.grad)
        state = defaultdict(dict, {copy: deepcopy(self.state.get(parameter, {}))})
        if self._rule.step([{**group, "params": [copy]}], state):
            raise RuntimeError(refusal("the wrapped optimizer adds up over all parameters"))

    def _check_in_order(self) -> None:
        if not self._has_agreed:
            self._driver.agree(self._allocation.settings())
            self._has_agreed = True
        if self._allocation.is_unmeasured(0):
            raise RuntimeError(
                "Budget has measured nothing: step() came before any training forward, with rows "
                "in its batch, of the model given to DynamicAllocationOptimizer. Call that model "
                "itself (or a wrapper that calls it), in train() mode."
            )

    def _reallocate(self) -> None:
        self._driver.watch_synchronization(self._allocation.chosen)
        activated = self._allocation.select(self.tracker.roll())
        self._driver.agree(self._allocation.settings())
        self._apply_allocation(probe=self.tracker.probe)
        returning = flatten(g for g in self.param_groups if g["name"] in activated)
        reset(self.state, returning, self._on_activate)

    def _apply_allocation(self, *, probe: bool) -> None:
        self._driver.apply(self._allocation.chosen, probe=probe)
        self._drop_idle_gradients()
        self._settle_states()

    @torch.no_grad()
    def _settle_states(self) -> None:
        """Put the optimizer state where the active set wants it."""
        idle = flatten(group for group in self.param_groups if not self._is_active(group))
        active = flatten(group for group in self.param_groups if self._is_active(group))
        self._masters.write_back(self.state, idle, number=self._allocation.steps)
        self._idle_state.release(self.state, idle)
        self._idle_state.restore(self.state, active)

    def _drop_idle_gradients(self) -> None:
        drop_gradients(flatten(g for g in self.param_groups if not self._is_active(g)))

    def _is_active(self, group: ParamGroup) -> bool:
        name = group["name"]
        return name not in self._frozen and self._allocation.is_active(name)

    def active_parameters(self) -> list[Tensor]:
        """Return the parameters that get gradients now, those outside all groups among them."""
        return flatten(group for group in self.param_groups if self._is_active(group))

    def learning_rates(self) -> list[float]:
        """Return the rate that each of ``param_groups`` had at the last update, local ones too."""
        return [float(rate) for rate in self._rates.last]

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
        costs, plan = self._driver.current_costs(args, kwargs)
        allocated = flatten(g for g in self.param_groups if g["name"] in self._allocation.updates)
        return memory_report(
            (costs, plan, self._driver.block_names),
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
        if fused := getattr(self, "_fused", None):
            fused.attach(self.param_groups, self._update_one)

    def _adopt_new_groups(self, parameters: Sequence[Tensor]) -> None:
        found = find_groups(self._model, self._group_rule)
        index = ParameterIndex(self._model, found)
        index.check_belongs(parameters)
        self._driver.check_same(index.groups_of(parameters))
        known = {group["name"] for group in self.param_groups}
        new = [
            group
            for group in index.groups_of(parameters)
            if group.fate == "allocated" and group.name not in known
        ]
        self._allocation.extend([g.name for g in new], order=[g.name for g in found])
        self._index = index
        self._driver.add(new)
        claim(self, (module for group in new for module in group.modules))
        self._apply_allocation(probe=self._driver.is_probing)

    def close(self) -> None:
        """Make every module active again and remove all hooks.

        The record and the state stay readable; `step` raises from here on.
        """
        self._driver.close()
        if self._fused:
            self._fused.remove()
        release(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the torch state dict plus all that decides the future of the allocation.

        It loads with ``torch.load(weights_only=True)``. What a resume needs is a string in each of
        ``param_groups``, which ``torch.distributed.checkpoint`` keeps; ``"record"`` is the history.
        """
        self._idle_state.settle()
        packed: dict[str, Any] = super().state_dict()
        marks = add_placeholders(
            packed, self.param_groups, self.state, provisional=self._is_provisional
        )
        values = zip(self._state_values(), marks, strict=True)
        pack(packed, [{**value, **mark} for value, mark in values])
        packed["record"] = self.record.state_dict()
        return packed

    def _state_values(self) -> list[dict[str, Any]]:
        """What decides the future, as plain values per param group."""
        clock = {
            **self._allocation.clock_state(),
            "importance": self.tracker.description,
            "probing": self._driver.is_probing,
        }
        scores = self.tracker.state_dict()
        names = [group["name"] for group in self.param_groups]
        costs = self._allocation.costs
        once = {"costs": costs.state_dict() if costs else None}  # large: in the first group only
        return [
            {
                **clock,
                **(once if position == 0 else {}),
                **self._allocation.group_state(name),
                **scores.get(name, {}),
                **self._rates.group_state(self._lines, position),
            }
            for position, name in enumerate(names)
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit, also in the middle of a period.

        Of a plain optimizer's state dict, saved with the same parameters in the same groups as the
        wrapped one was given, state and options are taken over, and the allocation begins anew.

        Raises:
            ValueError: It is for other module groups, parameters or settings. Nothing is changed
                then.
        """
        with damage_refused():
            if is_plain(state_dict, self.param_groups):
                self._load_plain(state_dict)
                return
            lean, values = unpack(state_dict, self.param_groups)
            check_keys(lean)
            record = state_dict.get("record", [])
            by_name = dict(zip((g["name"] for g in self.param_groups), values, strict=True))
            self.tracker.check_description(values[0]["importance"])
            check_values(values, self._state_values(), record)
            self.tracker.check_state(by_name)
            self._allocation.check_state(values[0], by_name)
            self._rates.check_state(self._lines, values)
        super().load_state_dict(lean)
        restore_dtypes(self.state, self.param_groups, lean)
        self._is_provisional = False
        self._allocation.load_state(values[0], by_name, record)
        self.tracker.load_state_dict(by_name, step=self._allocation.steps)
        self._rates.load_state(self._lines, values)
        self._apply_allocation(probe=values[0]["probing"])

    def _load_plain(self, state_dict: dict[str, Any]) -> None:
        packed = from_plain(state_dict, self.param_groups, self._lines, self._users)
        super().load_state_dict(packed)
        restore_dtypes(self.state, self.param_groups, packed)
        self._is_provisional = False
        self._allocation.restart()
        self.tracker.restart()
        self._rates.restart()
        self._apply_allocation(probe=self.tracker.probe)

    def plain_state_dict(self) -> dict[str, Any]:
        """Return what the wrapped optimizer's own ``load_state_dict`` takes.

        Its groups and their parameters are those that it was given, in that order. Modules that
        were never active have no state in it, as parameters without a gradient have none.

        Raises:
            ValueError: Groups that were split from one of yours have come to differ in an option,
                such as a rate that was set for one module.
        """
        self._idle_state.settle()
        state = {} if self._is_provisional else self.state
        return to_plain(self.param_groups, self._lines, self._users, state)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self._rule.optimizer).__name__}, "
            f"{len(self.active_groups)} of {len(self.groups)} groups active after "
            f"{self._allocation.steps} steps)"
        )

    def _take_charge(self) -> None:
        """Claim what this object drives, and leave it free when this object is gone."""
        super()._take_charge()
        if self._fused:
            self._fused.attach(self.param_groups, self._update_one)
            weakref.finalize(self, self._fused.remove).atexit = False
        claim(self, [self._rule.optimizer, *self._driver.modules()])
        self._driver.attach()
        weakref.finalize(self, self._driver.close).atexit = False
        if self._driver.is_probing:  # a copy: its parameters came without the probe's hooks
            self._apply_allocation(probe=True)
