"""`DynamicAllocationOptimizer`: the clock, the delegation and the state of a run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynalora_optim._allocation import Allocation
from dynalora_optim._allocators import Allocator, as_allocator
from dynalora_optim._checkpoint import pack, unpack
from dynalora_optim._checks import check_single_process
from dynalora_optim._claims import claim, release
from dynalora_optim._freezing import drop_gradients
from dynalora_optim._groups import GroupRule, find_groups
from dynalora_optim._importance import ImportanceTracker, as_tracker
from dynalora_optim._lr import LocalLR, LrTime, Rates
from dynalora_optim._measures import ImportanceMeasure
from dynalora_optim._modules import ModuleDriver
from dynalora_optim._param_groups import (
    ParameterIndex,
    ParamGroup,
    flatten,
    match_always_active,
)
from dynalora_optim._record import AllocationRecord
from dynalora_optim._schedules import Schedule, as_schedule
from dynalora_optim._states import OnActivate, add_placeholders, check_on_activate, reset
from dynalora_optim._update_rule import LateBoundOptimizer, check_wrappable


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
        groups: ``"auto"`` finds our adapters and peft's; or a callable
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

    Attributes:
        tracker: The `ImportanceTracker`: ``tracker.scores()`` at any time.

    Raises:
        TypeError: An argument of another kind.
        ValueError: An argument out of range, a model without adapters, or an optimizer that does
            not hold the adapters. Nothing is changed then.
        NotImplementedError: Several processes train together.

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
    ) -> None:
        check_single_process()
        has_local_schedule = isinstance(lr_time, LocalLR) and lr_time.is_from_scheduler
        check_wrappable(optimizer, scheduled=has_local_schedule)
        check_on_activate(on_activate, optimizer)
        found = find_groups(model, groups)
        index = ParameterIndex(model, found)
        index.check_belongs(flatten(optimizer.param_groups))
        index.check_groups(flatten(optimizer.param_groups))
        exempt = match_always_active(always_active, found)
        allocated = [group for group in found if group.name not in exempt]
        self._allocation = Allocation(
            [group.name for group in allocated],
            active=active,
            allocator=as_allocator(allocator),
            schedule=as_schedule(period),
            seed=seed,
            warmup=warmup,
            max_idle_periods=max_idle_periods,
        )
        self._allocation.select(dict.fromkeys(self._allocation.names, 0.0))
        self._rates = Rates(lr_time, activation_warmup)
        self._rates.check([i for i, g in enumerate(optimizer.param_groups) for _ in index.split(g)])
        self._on_activate = on_activate
        self.tracker = as_tracker(importance)
        self.tracker.check(allocated)
        # Nothing outside this object has changed so far; nothing below raises.
        self._model, self._group_rule = model, groups
        super().__init__(optimizer, index)
        self._driver = ModuleDriver(model, allocated, self.tracker)
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
            RuntimeError: After `close`.
        """
        if self._driver.is_closed:
            raise RuntimeError("step() after close(): build a new DynamicAllocationOptimizer.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._driver.before_update(self._allocation.chosen)
        self._drop_idle_gradients()  # frozen means unmoved, whatever put a gradient there
        active = [group for group in self.param_groups if self._is_active(group)]
        updated = {group["name"] for group in active if _has_gradient(group)}
        with self._rates.applied(self.param_groups, self._lines, self._allocation):
            self._rule.step(active, self.state)
        due = self._allocation.advance(updated)
        self.tracker.end_step(self._allocation.steps)
        if due:
            self._reallocate()
        return loss

    def _reallocate(self) -> None:
        check_single_process()  # the group may have been formed after this object
        activated = self._allocation.select(self.tracker.roll())
        returning = flatten(g for g in self.param_groups if g["name"] in activated)
        reset(self.state, returning, self._on_activate)
        self._apply_allocation(probe=self.tracker.probe)

    def _apply_allocation(self, *, probe: bool) -> None:
        self._driver.apply(self._allocation.chosen, probe=probe)
        self._drop_idle_gradients()

    def _drop_idle_gradients(self) -> None:
        drop_gradients(flatten(g for g in self.param_groups if not self._is_active(g)))

    def _is_active(self, group: ParamGroup) -> bool:
        return self._allocation.is_active(group["name"])

    def learning_rates(self) -> list[float]:
        """Return the rate that each of ``param_groups`` had at the last update, local ones too."""
        return [float(rate) for rate in self._rates.last]

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
        super().add_param_group(param_group)

    def _adopt_new_groups(self, parameters: Sequence[Tensor]) -> None:
        found = find_groups(self._model, self._group_rule)
        index = ParameterIndex(self._model, found)
        index.check_belongs(parameters)
        known = {group["name"] for group in self.param_groups}
        new = [group for group in index.groups_of(parameters) if group.name not in known]
        self._allocation.extend([g.name for g in new], order=[g.name for g in found])
        self._index = index
        claim(self, (module for group in new for module in group.modules))
        self._driver.add(new)
        self._apply_allocation(probe=self._driver.is_probing)

    def close(self) -> None:
        """Make every module active again and remove all hooks.

        The record and the state stay readable; `step` raises from here on.
        """
        self._driver.close()
        release(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the torch state dict plus all that decides the future of the allocation.

        It loads with ``torch.load(weights_only=True)``. What a resume needs are plain values in
        ``param_groups``, which ``torch.distributed.checkpoint`` keeps; ``"record"`` is the history.
        """
        packed: dict[str, Any] = super().state_dict()
        add_placeholders(packed, self.param_groups, self.state)
        pack(packed, self._state_values())
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
        return [
            {
                **clock,
                **self._allocation.group_state(name),
                **scores.get(name, {}),
                **self._rates.group_state(self._lines, position),
            }
            for position, name in enumerate(names)
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit, also in the middle of a period.

        Raises:
            ValueError: It was not saved by this class, or for other module groups. Nothing is
                changed then.
        """
        lean, values = unpack(state_dict, self.param_groups)
        self.tracker.check_description(values[0]["importance"])
        self._rates.check_state(self._lines, values)
        super().load_state_dict(lean)
        by_name = dict(zip((g["name"] for g in self.param_groups), values, strict=True))
        self._allocation.load_state(values[0], by_name, state_dict.get("record", []))
        self.tracker.load_state_dict(by_name, step=self._allocation.steps)
        self._rates.load_state(self._lines, values)
        self._apply_allocation(probe=values[0]["probing"])

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self._rule.optimizer).__name__}, "
            f"{len(self.active_groups)} of {len(self.groups)} groups active after "
            f"{self._allocation.steps} steps)"
        )

    def _take_charge(self) -> None:
        """Claim what this object drives, and leave it free when this object is gone."""
        super()._take_charge()
        claim(self, [self._rule.optimizer, *self._driver.modules()])
        weakref.finalize(self, self._driver.close).atexit = False
        if self._driver.is_probing:  # a copy: its parameters came without the probe's hooks
            self._apply_allocation(probe=True)


def _has_gradient(group: ParamGroup) -> bool:
    return any(parameter.grad is not None for parameter in group["params"])
