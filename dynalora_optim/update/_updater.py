"""Updating weights: one optimizer step over the active groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynalora_optim.update._backward import refusal
from dynalora_optim.update._fused import FusedBackward, Receive
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
        masters.check(optimizer)
        self.rule = UpdateRule(optimizer, masters)
        pause.check(self.rule)
        self.rates = rates
        self.pause = pause
        self._masters = masters
        self._idle_state = idle_state(pause, self.rule)
        self._fused = FusedBackward() if fused else None

    def attach(self, groups: Sequence[ParamGroup], receive: Receive) -> None:
        """Call ``receive``, a method that calls `update_one`, within the backward pass if fused."""
        if self._fused:
            self._fused.attach(groups, receive)

    def remove(self) -> None:
        """Stop updating within the backward pass."""
        if self._fused:
            self._fused.drop_spent()
            self._fused.remove()

    def end_backward(self, groups: Sequence[ParamGroup]) -> None:
        """Delete what stands in for gradients that were used within the backward pass.

        Raises:
            RuntimeError: An update now, with the options of ``groups``, would have been another.
        """
        if self._fused:
            self._fused.check(groups)
            self._fused.drop_spent()

    def update(
        self,
        pieces: Sequence[ParamGroup],
        *,
        state: State,
        clock: RateClock,
        is_active: Callable[[ParamGroup], bool],
        closure: Callable[[], Any] | None = None,
    ) -> tuple[set[str], list[ParamGroup]]:
        """Update the active pieces; ``closure``, if there is one, returns the loss.

        Returns:
            The names of the groups that had a gradient, and what the rule has stored in pieces.
        """
        active = [piece for piece in pieces if is_active(piece)]
        moved = {p for p in flatten(active) if p.grad is not None}
        if self._fused and moved and not self._fused.is_rehearsed:
            self._check_fusible(active, state)
        self.rates.apply(pieces, clock)
        changed = self.rule.step(active, state, closure)
        if self._fused:
            moved |= self._fused.end_step()
        names = {piece["name"] for piece in active if not moved.isdisjoint(piece["params"])}
        return names, changed

    def update_one(
        self,
        parameter: Tensor,
        piece: ParamGroup,
        *,
        state: State,
        clock: RateClock,
    ) -> None:
        """Update one parameter of ``piece`` within the backward pass."""
        self.rates.apply([piece], clock)
        self.rule.step([{**piece, "params": [parameter]}], state)

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


def evaluated(loss: Any) -> Callable[[], Any]:
    """Return a closure for the wrapped optimizer that returns the ``loss`` already evaluated, once.

    Raises:
        RuntimeError: It is called again: the optimizer evaluates the loss at several points.
    """
    calls = iter((loss,))

    def closure() -> Any:
        for value in calls:
            return value
        raise RuntimeError(
            "the wrapped optimizer calls its closure more than once in a step, to evaluate the "
            "loss at several points. This cannot be wrapped; pass an optimizer such as AdamW."
        )

    return closure
