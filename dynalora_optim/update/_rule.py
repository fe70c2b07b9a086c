"""The wrapped optimizer as an update rule, bound late: groups and state are handed to it each step.

It owns nothing in between. Sharing param groups between the two optimizers instead would break
at the first ``load_state_dict``, which ``accelerator.prepare`` calls.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynalora_optim._base.claims import is_claimed, is_owner
from dynalora_optim._base.torch_private import has_scheduler, share_step_hooks
from dynalora_optim.update._master_weights import MasterWeights
from dynalora_optim.update._param_groups import ParameterIndex, ParamGroup, flatten, parameters_of
from dynalora_optim.update._plain import UserGroup


class UpdateRule:
    """Runs a torch optimizer over whichever groups it is given."""

    def __init__(self, optimizer: Optimizer, masters: MasterWeights) -> None:
        self.optimizer = optimizer
        self._masters = masters

    def step(self, groups: Iterable[ParamGroup], state: Any) -> bool:
        """Update the parameters of ``groups``, with their moments in ``state``.

        Returns:
            Whether the rule keeps numbers of its own in the groups, as schedule-free ones do.
        """
        return self._run(_unhooked_step(self.optimizer), groups, state)

    def switch_mode(self, mode: str, groups: Iterable[ParamGroup], state: Any) -> None:
        """Call ``train()`` or ``eval()`` of an optimizer that has them (schedule-free kinds)."""
        if callable(method := getattr(self.optimizer, mode, None)):
            self._run(method, groups, state)

    def _run(self, method: Callable[[], Any], groups: Iterable[ParamGroup], state: Any) -> bool:
        merged = _coalesce(groups, state)
        before = [dict(one) for one, _ in merged]
        self.optimizer.param_groups = [one for one, _ in merged]
        with self._masters.lent(self.optimizer.param_groups, state) as lent:
            self.optimizer.state = lent  # type: ignore[assignment]
            method()
        self.optimizer.state = state
        has_changed = False
        for (one, sources), old in zip(merged, before, strict=True):
            # Some rules keep numbers in the group (schedule-free's k, Prodigy's d).
            changed = {
                k: v for k, v in one.items() if k != "params" and (k not in old or v is not old[k])
            }
            for source in sources:
                source.update(changed)
            has_changed |= bool(changed)
        return has_changed


class LateBoundOptimizer(Optimizer):
    """A torch optimizer that owns groups and state, and leaves the update to another optimizer.

    Its param groups are those of the other, split by a `ParameterIndex`; its state begins as the
    other's.
    """

    # GradScaler must unscale the gradients itself: the wrapped optimizer's fused kernel, which
    # could do it, never sees the scaler.
    _step_supports_amp_scaling = False

    def __init__(self, optimizer: Optimizer, index: ParameterIndex, masters: MasterWeights) -> None:
        self._rule = UpdateRule(optimizer, masters)
        self._index = index
        self._lines: list[int] = []  # per param group, the number of the user group it came from
        self._users: list[UserGroup] = []
        self._is_provisional = False  # the state was created for a checkpoint, not by training
        self.param_groups = []
        super().__init__(optimizer.param_groups, dict(optimizer.defaults))
        self.state.update(optimizer.state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, split per module group.

        Raises:
            ValueError: A parameter is held already. Nothing is changed then.
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
        """Let training create the state that was only rehearsed."""
        if self._is_provisional:
            self.state.clear()
            self._is_provisional = False

    def _check_new(self, param_group: dict[str, Any]) -> list[Tensor]:
        held = {id(parameter) for parameter in flatten(self.param_groups)}
        parameters = parameters_of(param_group)
        if any(id(parameter) in held for parameter in parameters):
            raise ValueError("add_param_group() got a parameter that another param group holds.")
        return parameters

    def train(self) -> None:
        """Switch a wrapped optimizer that has modes (schedule-free kinds) to training."""
        self._rule.switch_mode("train", self.param_groups, self.state)

    def eval(self) -> None:
        """Switch a wrapped optimizer that has modes (schedule-free kinds) to evaluation."""
        self._rule.switch_mode("eval", self.param_groups, self.state)

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
        """Let step hooks of the wrapped optimizer fire with this one's, once per step."""
        share_step_hooks(self, self._rule.optimizer)


def check_wrappable(optimizer: object, *, scheduled: bool = False) -> None:
    """Raise unless ``optimizer`` can serve as an update rule; one that is ``scheduled`` may.

    Raises:
        TypeError: It is no torch optimizer.
        ValueError: It is wrapped already, has a learning-rate scheduler, or cannot be allocated.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer={optimizer!r} is not a torch.optim.Optimizer; pass an instance such as "
            "torch.optim.AdamW(model.parameters(), lr=4e-4)."
        )
    kind = type(optimizer).__name__
    if is_owner(optimizer):
        raise ValueError(
            f"optimizer={kind} wraps another optimizer itself; pass that one, or use this as it is."
        )
    if is_claimed(optimizer):
        raise ValueError(
            f"optimizer={kind} is wrapped by another DynamicAllocationOptimizer already; build a "
            "new one, or close() the first wrapper."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer=LBFGS keeps one state over all parameters together, so modules cannot be "
            "active one by one; pass a per-parameter optimizer such as AdamW."
        )
    if has_scheduler(optimizer) and not scheduled:
        raise ValueError(
            f"optimizer={kind} has a learning-rate scheduler, which would go on changing rates "
            "that are no longer used; wrap first, then build the scheduler on the wrapper."
        )


def _unhooked_step(optimizer: Optimizer) -> Callable[[], Any]:
    """The ``step`` without torch's hook layer.

    The wrapper's own step has that layer and shares the hooks; through both, the process-wide hooks
    would fire twice.
    """
    step = type(optimizer).step
    patched = "step" in vars(optimizer) and not has_scheduler(optimizer)
    if patched or not getattr(step, "hooked", False):
        return optimizer.step
    inner = getattr(step, "__wrapped__", step)
    return lambda: inner(optimizer)


def _coalesce(
    groups: Iterable[ParamGroup], state: Mapping[Tensor, Any]
) -> list[tuple[ParamGroup, list[ParamGroup]]]:
    """Join groups of equal options, so that one fused or foreach call updates them all.

    Groups at their first update stay apart: torch's fused SGD refuses a mix of parameters with and
    without a momentum buffer. So do those that are sharded otherwise: no foreach takes both.
    """
    alike: dict[Hashable, list[ParamGroup]] = {}
    for group in groups:
        has_state = any(state.get(parameter) for parameter in group["params"])
        meshes = frozenset(getattr(p, "device_mesh", None) for p in group["params"])
        alike.setdefault((_options_key(group), has_state, meshes), []).append(group)
    return [
        ({**sources[0], "params": [p for source in sources for p in source["params"]]}, sources)
        for sources in alike.values()
    ]


def _options_key(group: ParamGroup) -> Hashable:
    return tuple(
        (key, _hashable(value))
        for key, value in group.items()
        if key not in ("params", "param_names", "name")
    )


def _hashable(value: object) -> Hashable:
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    # True == 1 == 1.0 as keys, but not as options.
    return (type(value), value) if isinstance(value, Hashable) else id(value)
