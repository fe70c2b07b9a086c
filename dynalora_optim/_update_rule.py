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

from dynalora_optim._claims import is_claimed, is_owner
from dynalora_optim._param_groups import ParamGroup


class UpdateRule:
    """Runs a torch optimizer over whichever groups it is given."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, groups: Iterable[ParamGroup], state: Any) -> None:
        """Update the parameters of ``groups``, with their moments in ``state``."""
        self._run(_unhooked_step(self.optimizer), groups, state)

    def switch_mode(self, mode: str, groups: Iterable[ParamGroup], state: Any) -> None:
        """Call ``train()`` or ``eval()`` of an optimizer that has them (schedule-free kinds)."""
        if callable(method := getattr(self.optimizer, mode, None)):
            self._run(method, groups, state)

    def _run(self, method: Callable[[], Any], groups: Iterable[ParamGroup], state: Any) -> None:
        merged = _coalesce(groups, state)
        before = [dict(one) for one, _ in merged]
        self.optimizer.param_groups = [one for one, _ in merged]
        self.optimizer.state = state
        method()
        for (one, sources), old in zip(merged, before, strict=True):
            # Some rules keep numbers in the group (schedule-free's k, Prodigy's d).
            changed = {k: v for k, v in one.items() if k not in old or v is not old[k]}
            for source in sources:
                source.update(changed)


def check_wrappable(optimizer: object) -> None:
    """Raise unless ``optimizer`` can serve as an update rule.

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
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
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
    if "step" in vars(optimizer) or not getattr(step, "hooked", False):
        return optimizer.step
    inner = getattr(step, "__wrapped__", step)
    return lambda: inner(optimizer)


def _coalesce(
    groups: Iterable[ParamGroup], state: Mapping[Tensor, Any]
) -> list[tuple[ParamGroup, list[ParamGroup]]]:
    """Join groups of equal options, so that one fused or foreach call updates them all.

    Groups at their first update stay apart: torch's fused SGD refuses a mix of parameters with and
    without a momentum buffer.
    """
    alike: dict[Hashable, list[ParamGroup]] = {}
    for group in groups:
        has_state = any(state.get(parameter) for parameter in group["params"])
        alike.setdefault((_options_key(group), has_state), []).append(group)
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
