"""Updating weights: one optimizer step over the active groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynalora_optim.update._fused import FusedBackward, Update, refusal
from dynalora_optim.update._idle_state import idle_state
from dynalora_optim.update._master_weights import MasterWeights
from dynalora_optim.update._param_groups import ParamGroup, State, flatten
from dynalora_optim.update._pause import Pause
from dynalora_optim.update._rates import RateClock, Rates
from dynalora_optim.update._rule import UpdateRule


class Updater:
    """Updates active parameters with the rates of their modules, and manages their state.

    Args:
        optimizer: The wrapped optimizer.
        rates: The learning rate of each param group.
        pause: What happens to the state of groups that pause.
        masters: The float32 copies of low-precision weights.
        fused: Whether to update within the backward pass.

    Raises:
        ValueError: The optimizer cannot be used with ``pause`` or ``masters``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rates: Rates,
        pause: Pause,
        masters: MasterWeights,
        *,
        fused: bool,
    ) -> None:
        pause.check(optimizer)
        masters.check(optimizer)
        self.rule = UpdateRule(optimizer, masters)
        self.rates = rates
        self.pause = pause
        self._masters = masters
        self._idle_state = idle_state(pause, optimizer)
        self._fused = FusedBackward() if fused else None

    def attach(self, groups: Sequence[ParamGroup], update: Update) -> None:
        """Call ``update``, a method that calls `update_one`, within the backward pass if fused."""
        if self._fused:
            self._fused.attach(groups, update)

    def remove(self) -> None:
        """Stop updating within the backward pass."""
        if self._fused:
            self._fused.remove()

    def update(
        self,
        groups: Sequence[ParamGroup],
        lines: Sequence[int],
        *,
        state: State,
        clock: RateClock,
        is_active: Callable[[ParamGroup], bool],
    ) -> set[str]:
        """Update the active groups; return the names of those that had a gradient."""
        active = [group for group in groups if is_active(group)]
        moved = {p for p in flatten(active) if p.grad is not None}
        if self._fused and moved and not self._fused.is_rehearsed:
            self._fused.check()
            self._check_fusible(active, state)
        with self.rates.applied(groups, lines, clock):
            self.rule.step(active, state)
        if self._fused:
            moved |= self._fused.end_step()
        return {group["name"] for group in active if not moved.isdisjoint(group["params"])}

    def update_one(
        self,
        parameter: Tensor,
        group: ParamGroup,
        groups: Sequence[ParamGroup],
        lines: Sequence[int],
        *,
        state: State,
        clock: RateClock,
    ) -> None:
        """Update one parameter of ``group``, one of ``groups``, within the backward pass."""
        with self.rates.applied(groups, lines, clock):
            self.rule.step([{**group, "params": [parameter]}], state)

    def _check_fusible(self, groups: Sequence[ParamGroup], state: State) -> None:
        """Try the rule on a copy of one parameter; raise if it sums values over all parameters."""
        pairs = [(p, group) for group in groups for p in group["params"] if p.grad is not None]
        parameter, group = min(pairs, key=lambda pair: pair[0].numel())
        copy = parameter.detach().clone()
        copy.grad = deepcopy(parameter.grad)
        tried = defaultdict(dict, {copy: deepcopy(state.get(parameter, {}))})
        if self.rule.step([{**group, "params": [copy]}], tried):
            raise RuntimeError(refusal("the wrapped optimizer sums over all parameters"))

    @torch.no_grad()
    def settle(
        self, state: State, active: Iterable[Tensor], idle: Sequence[Tensor], *, number: int
    ) -> None:
        """Move or delete the state of idle parameters, restore that of active ones.

        The master weights of idle parameters are rounded; ``number`` seeds the rounding.
        """
        self._masters.write_back(state, idle, number=number)
        self._idle_state.release(state, idle)
        self._idle_state.restore(state, active)

    def wait(self) -> None:
        """Return when every value in the state can be read."""
        self._idle_state.settle()
