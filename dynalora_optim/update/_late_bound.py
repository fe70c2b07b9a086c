"""A torch optimizer that owns groups and state, and leaves the update to another optimizer.

The other optimizer gets the groups and the state only for each update. If both shared their param
groups, the first ``load_state_dict``, which ``accelerator.prepare`` calls, would separate them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dynalora_optim._base.torch_private import share_step_hooks
from dynalora_optim.update._param_groups import ParameterIndex, flatten, parameters_of
from dynalora_optim.update._plain import UserGroup, user_groups
from dynalora_optim.update._rule import UpdateRule


class LateBoundOptimizer(Optimizer):
    """A torch optimizer that owns groups and state, and leaves the update to another optimizer.

    Its param groups are those of the other optimizer, split by a `ParameterIndex`. It starts with
    the state of the other optimizer.
    """

    # GradScaler must unscale the gradients itself: the wrapped optimizer's fused kernel could do
    # it, but does not get the scale.
    _step_supports_amp_scaling = False

    def __init__(self, optimizer: Optimizer, index: ParameterIndex, rule: UpdateRule) -> None:
        self._rule = rule
        self._index = index
        self._lines: list[int] = []  # per param group, the number of its user group
        self._users: list[UserGroup] = []
        self._is_provisional = False  # the state was created for a checkpoint, not by training
        self.param_groups = []
        super().__init__(optimizer.param_groups, dict(optimizer.defaults))
        self.state.update(optimizer.state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, split per module group.

        Raises:
            ValueError: A param group already holds one of the parameters. Then nothing is changed.
        """
        parameters = self._check_new(param_group)
        pieces = self._index.split({**param_group, "params": parameters})
        if pieces:
            self._lines += [len(self._users)] * len(pieces)
            names = tuple(self._index.names_of(parameters))
            self._users.append(UserGroup(names, has_names="param_names" in param_group))
        for piece in pieces:
            super().add_param_group(piece)

    def _rehearse(self) -> None:
        """Create all state, and change nothing else."""
        options = [dict(group) for group in self.param_groups]
        self._rule.step(self.param_groups, self.state)
        for group, before in zip(self.param_groups, options, strict=True):
            group.clear()
            group.update(before)
        self._is_provisional = True

    def _drop_provisional(self) -> None:
        """Delete state that was created for a checkpoint only; training creates it again."""
        if self._is_provisional:
            self.state.clear()
            self._is_provisional = False

    def _check_new(self, param_group: dict[str, Any]) -> list[Tensor]:
        held = {id(parameter) for parameter in flatten(self.param_groups)}
        parameters = parameters_of(param_group)
        if any(id(parameter) in held for parameter in parameters):
            raise ValueError("add_param_group() got a parameter that another param group holds.")
        return parameters

    def _give_back(self) -> None:
        """Give the wrapped optimizer the user's groups with their current options and state."""
        groups = user_groups(self.param_groups, self._lines, self._users)
        self._rule.optimizer.param_groups = groups
        self._rule.optimizer.state = self.state

    def train(self) -> None:
        """Switch a wrapped optimizer that has modes (schedule-free) to training."""
        self._rule.switch_mode("train", self.param_groups, self.state)

    def eval(self) -> None:
        """Switch a wrapped optimizer that has modes (schedule-free) to evaluation."""
        self._rule.switch_mode("eval", self.param_groups, self.state)

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
            self._take_charge()

    def _take_charge(self) -> None:
        """Use the step hooks of the wrapped optimizer in this one; each runs once per step."""
        share_step_hooks(self, self._rule.optimizer)
