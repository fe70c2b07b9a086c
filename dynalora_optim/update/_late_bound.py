"""A torch optimizer that leaves the update to another optimizer, the wrapped one.

Both have the same param groups and the same state: what a scheduler or a user sets in one is set in
the other. Only for an update the wrapped optimizer gets groups with the active modules alone.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dynalora_optim._base.torch_private import share_step_hooks
from dynalora_optim.update._param_groups import (
    PACKED,
    ParameterIndex,
    ParamGroup,
    flatten,
    parameters_of,
)
from dynalora_optim.update._pieces import Part, Pieces
from dynalora_optim.update._rule import UpdateRule


class LateBoundOptimizer(Optimizer):
    """A torch optimizer that has the groups and the state of another, which makes the updates."""

    # GradScaler must unscale the gradients itself: the wrapped optimizer's fused kernel could do
    # it, but does not get the scale.
    _step_supports_amp_scaling = False

    def __init__(self, optimizer: Optimizer, index: ParameterIndex, rule: UpdateRule) -> None:
        self._rule = rule
        self._pieces = Pieces(index)
        self._is_linked = False
        self._before: dict[Any, Any] = {}
        self._is_provisional = False  # the state was created for a checkpoint, not by training
        super().__init__(optimizer.param_groups, dict(optimizer.defaults))
        # The very list: an earlier wrapper, which a scheduler may still set rates in, has it too.
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self._link()
        self._parts()

    def _link(self) -> None:
        """Give the wrapped optimizer the same groups and the same state."""
        for group in self.param_groups:
            group[PACKED] = ""
        self._rule.optimizer.param_groups = self.param_groups
        self._rule.optimizer.state = self.state
        self._shared = self.param_groups, self.state
        self._is_linked = True

    def _relink(self) -> None:
        """Share again what was set anew, as Lightning's BaseFinetuning does, or loaded."""
        self._follow()
        if not self._shares(self):
            self._link()

    def _follow(self) -> None:
        """Take over the groups and the state that the wrapped optimizer has loaded or was given."""
        inner = self._rule.optimizer
        if self._shares(self) and not self._shares(inner):
            self.param_groups, self.state = self._shared = inner.param_groups, inner.state

    def _shares(self, optimizer: Optimizer) -> bool:
        groups, state = self._shared
        return optimizer.param_groups is groups and optimizer.state is state

    def _unlink(self) -> None:
        """Leave the groups and the state to the wrapped optimizer, as it would have made them."""
        for group in self.param_groups:
            group.pop(PACKED, None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group.

        Raises:
            ValueError: A param group already holds one of the parameters. Then nothing is changed.
        """
        if not self._is_linked:  # torch's constructor adds the groups of the wrapped optimizer
            super().add_param_group(param_group)
            return
        self._check_new(param_group)
        self._rule.optimizer.add_param_group(param_group)
        self.param_groups = self._rule.optimizer.param_groups
        self._link()

    @property
    def module_groups(self) -> list[ParamGroup]:
        """The param groups split by module group, as an update sees them.

        Each has the ``"name"`` of its module group, ``"params"``, ``"param_names"``, and the
        options of the param group that it is a part of. They are copies: to change an option, set
        it in ``param_groups``. For a rate of its own, give a module a param group of its own.
        """
        return self._pieces.of(self.param_groups)

    def _parts(self) -> list[Part]:
        return self._pieces.parts(self.param_groups)

    def _step_rule(self, pieces: list[ParamGroup], state: Any = None) -> bool:
        """Update ``pieces``; return whether the rule stores its own numbers in the groups."""
        changed = self._rule.step(pieces, self.state if state is None else state)
        self._pieces.keep(self.param_groups, changed)
        return bool(changed)

    def _rehearse(self) -> None:
        """Create all state, and change nothing else."""
        self._before = copy.deepcopy(dict(self.state))  # none of it is of a parameter
        self._rule.step(self.module_groups, self.state)
        self._is_provisional = True

    def _drop_provisional(self) -> None:
        """Delete state that was created for a checkpoint only; training creates it again."""
        if self._is_provisional:
            self.state.clear()
            self.state.update(self._before)
            self._is_provisional = False

    def _check_new(self, param_group: Mapping[str, Any]) -> list[Tensor]:
        held = {id(parameter) for parameter in flatten(self.param_groups)}
        parameters = parameters_of(param_group)
        if any(id(parameter) in held for parameter in parameters):
            raise ValueError("add_param_group() got a parameter that another param group holds.")
        return parameters

    def train(self) -> None:
        """Switch a wrapped optimizer that has modes (schedule-free) to training."""
        self._switch_mode("train")

    def eval(self) -> None:
        """Switch a wrapped optimizer that has modes (schedule-free) to evaluation."""
        self._switch_mode("eval")

    def _switch_mode(self, mode: str) -> None:
        changed = self._rule.switch_mode(mode, self.module_groups, self.state)
        self._pieces.keep(self.param_groups, changed)

    def __getstate__(self) -> dict[str, Any]:
        # As in every torch optimizer, hooks and a scheduler's patch of step() are not copied.
        return {
            key: value
            for key, value in self.__dict__.items()
            if key != "step" and not key.endswith("_hooks")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_rule" in state:  # a copy; load_state_dict also calls this method
            self._link()
            self._take_charge()

    def _take_charge(self) -> None:
        """Use the step hooks of the wrapped optimizer in this one; each runs once per step."""
        inner, follower = self._rule.optimizer, weakref.WeakMethod(self._follow)
        share_step_hooks(self, inner)
        inner.register_load_state_dict_post_hook(partial(_call, follower))


def _call(method: weakref.WeakMethod[Any], optimizer: Optimizer) -> None:
    if found := method():
        found()
