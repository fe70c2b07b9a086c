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
from dynalora_optim._checkpoint import pack, restore, unpack
from dynalora_optim._claims import claim, release
from dynalora_optim._freezing import Freezer, drop_gradients
from dynalora_optim._groups import GroupRule, find_groups
from dynalora_optim._importance import ImportanceTracker, as_tracker
from dynalora_optim._measures import ImportanceMeasure
from dynalora_optim._param_groups import (
    ParameterIndex,
    ParamGroup,
    flatten,
    match_always_active,
    parameters_of,
)
from dynalora_optim._record import AllocationRecord
from dynalora_optim._schedules import Schedule, as_schedule
from dynalora_optim._update_rule import UpdateRule, check_wrappable


class DynamicAllocationOptimizer(Optimizer):
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
        importance: ``"forward"`` (equation 1, p=2), a measure such as ``ForwardNorm(p=1)``, or an
            `ImportanceTracker` with a window of its own.
        allocator: ``"discounted"`` (equation 3), ``"topk"``, ``"threshold"``, ``"stochastic"``,
            ``"random"``, ``"round_robin"``, or an allocator object.
        groups: ``"auto"`` finds our adapters and peft's; or a callable
            ``(name, module) -> group name or None``.
        always_active: Names of module groups, or patterns with ``*``, that are never inactive.
        seed: The seed of the allocator's private random numbers.

    Attributes:
        tracker: The `ImportanceTracker`: ``tracker.scores()`` at any time.

    Raises:
        TypeError: An argument of another kind.
        ValueError: An argument out of range, a model without adapters, or an optimizer that does
            not hold the adapters. Nothing is changed then.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4)  # doctest: +SKIP
        >>> optimizer = DynamicAllocationOptimizer(optimizer, model, active=16, period=50)

    Source: "Dynamic Low-Rank Module Allocation" (DynaLoRA), sections 3.1 to 3.3.
    """

    # GradScaler must unscale the gradients itself: the wrapped optimizer's fused kernel, which
    # could do it, never sees the scaler.
    _step_supports_amp_scaling = False

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
    ) -> None:
        check_wrappable(optimizer)
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
        )
        self.tracker = as_tracker(importance)
        # Nothing outside this object has changed so far; nothing below raises.
        self._model, self._group_rule, self._index = model, groups, index
        self._rule = UpdateRule(optimizer)
        self._freezer = Freezer(allocated)
        super().__init__(optimizer.param_groups, dict(optimizer.defaults))
        self.state.update(optimizer.state)
        self.tracker.attach(allocated)
        self._take_charge()
        self._reallocate()

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
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._drop_idle_gradients()  # frozen means unmoved, whatever put a gradient there
        active = [group for group in self.param_groups if self._is_active(group)]
        updated = {group["name"] for group in active if _has_gradient(group)}
        self._rule.step(active, self.state)
        self.tracker.end_step()
        if self._allocation.advance(updated):
            self._reallocate()
        return loss

    def _reallocate(self) -> None:
        self._allocation.select(self.tracker.roll())
        self._apply_allocation()

    def _apply_allocation(self) -> None:
        self._freezer.set_active(self._allocation.chosen)
        self._drop_idle_gradients()

    def _drop_idle_gradients(self) -> None:
        drop_gradients(flatten(g for g in self.param_groups if not self._is_active(g)))

    def _is_active(self, group: ParamGroup) -> bool:
        return self._allocation.is_active(group["name"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, split per module group as those given at construction.

        Its parameters may belong to modules adapted since: these join the allocation as new groups.

        Raises:
            ValueError: A parameter is not the model's, or is held already. Nothing is changed then.
        """
        held = {id(parameter) for parameter in flatten(self.__dict__.get("param_groups", []))}
        parameters = parameters_of(param_group)
        if any(id(parameter) in held for parameter in parameters):
            raise ValueError("add_param_group() got a parameter that another param group holds.")
        if held:
            self._adopt_new_groups(parameters)
        for piece in self._index.split({**param_group, "params": parameters}):
            super().add_param_group(piece)

    def _adopt_new_groups(self, parameters: Sequence[Tensor]) -> None:
        found = find_groups(self._model, self._group_rule)
        index = ParameterIndex(self._model, found)
        index.check_belongs(parameters)
        self._index = index
        ids = {id(parameter) for parameter in parameters}
        known = {group["name"] for group in self.param_groups}
        new = [
            group
            for group in found
            if group.name not in known and not ids.isdisjoint(map(id, group.parameters()))
        ]
        self._freezer.add(new)
        claim(self, (module for group in new for module in group.modules))
        self.tracker.attach(new)
        self._allocation.extend([g.name for g in new], order=[g.name for g in found])
        self._apply_allocation()

    def train(self) -> None:
        """Switch a wrapped optimizer that has modes (schedule-free kinds) to training."""
        self._rule.switch_mode("train", self.param_groups, self.state)

    def eval(self) -> None:
        """Switch a wrapped optimizer that has modes (schedule-free kinds) to evaluation."""
        self._rule.switch_mode("eval", self.param_groups, self.state)

    def close(self) -> None:
        """Make every module active again and remove all hooks; the record stays readable."""
        _let_go(self._freezer, self.tracker)
        release(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the torch state dict plus all that decides the future of the allocation.

        It loads with ``torch.load(weights_only=True)``. What a resume needs are plain values in
        ``param_groups``, which ``torch.distributed.checkpoint`` keeps; ``"record"`` is the history.
        """
        return pack(
            super().state_dict(), self.param_groups, self.state, self._allocation, self.tracker
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit, also in the middle of a period.

        Raises:
            ValueError: It was not saved by this class, or for other module groups. Nothing is
                changed then.
        """
        super().load_state_dict(unpack(state_dict, self.param_groups))
        restore(state_dict, self._allocation, self.tracker)
        self._apply_allocation()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self._rule.optimizer).__name__}, "
            f"{len(self.active_groups)} of {len(self.groups)} groups active after "
            f"{self._allocation.steps} steps)"
        )

    def __getstate__(self) -> dict[str, Any]:
        # As for every torch optimizer, hooks and a scheduler's patch of step() stay behind.
        return {
            key: value
            for key, value in self.__dict__.items()
            if key != "step" and not key.endswith("_hooks")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_rule" in state:  # a copy; load_state_dict comes through here too
            self._take_charge()

    def _take_charge(self) -> None:
        """Claim what this object drives, and leave it free when this object is gone."""
        wrapped = self._rule.optimizer
        # Step hooks of the wrapped optimizer fire with this one's, once per step.
        self._optimizer_step_pre_hooks = wrapped._optimizer_step_pre_hooks
        self._optimizer_step_post_hooks = wrapped._optimizer_step_post_hooks
        claim(self, [wrapped, *self._freezer.modules()])
        weakref.finalize(self, _let_go, self._freezer, self.tracker).atexit = False


def _let_go(freezer: Freezer, tracker: ImportanceTracker) -> None:
    freezer.close()
    tracker.close()


def _has_gradient(group: ParamGroup) -> bool:
    return any(parameter.grad is not None for parameter in group["params"])
