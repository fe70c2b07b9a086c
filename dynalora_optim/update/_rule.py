"""The wrapped optimizer as an update rule: it is given groups and state at each step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dynalora_optim._base.torch_private import has_scheduler
from dynalora_optim.update._master_weights import MasterWeights
from dynalora_optim.update._param_groups import ParamGroup


class UpdateRule:
    """Runs a torch optimizer over the groups that it is given."""

    def __init__(self, optimizer: Optimizer, masters: MasterWeights) -> None:
        self.optimizer = optimizer
        self._masters = masters

    def step(self, groups: Iterable[ParamGroup], state: Any) -> bool:
        """Update the parameters of ``groups``, with their moments in ``state``.

        Returns:
            Whether the rule stores its own numbers in the groups, as schedule-free optimizers do.
        """
        return self._run(_unhooked_step(self.optimizer), groups, state)

    def switch_mode(self, mode: str, groups: Iterable[ParamGroup], state: Any) -> None:
        """Call ``train()`` or ``eval()`` of an optimizer that has them (schedule-free)."""
        if callable(method := getattr(self.optimizer, mode, None)):
            self._run(method, groups, state)

    def _run(self, method: Callable[[], Any], groups: Iterable[ParamGroup], state: Any) -> bool:
        merged = _coalesce(groups, state)
        before = [dict(one) for one, _ in merged]
        # Between updates the optimizer has the groups that the user gave it.
        whole = self.optimizer.param_groups
        self.optimizer.param_groups = [one for one, _ in merged]
        try:
            with self._masters.in_place(self.optimizer.param_groups, state) as copies:
                self.optimizer.state = copies  # type: ignore[assignment]
                method()
        finally:
            self.optimizer.param_groups = whole
            self.optimizer.state = state
        has_changed = False
        for (one, sources), old in zip(merged, before, strict=True):
            # Some rules store numbers in the group (schedule-free's k, Prodigy's d).
            changed = {
                k: v for k, v in one.items() if k != "params" and (k not in old or v is not old[k])
            }
            for source in sources:
                source.update(changed)
            has_changed |= bool(changed)
        return has_changed


def _unhooked_step(optimizer: Optimizer) -> Callable[[], Any]:
    """Return the optimizer's ``step`` without torch's hooks.

    The wrapper's own step already calls the hooks, so that the process-wide ones would run twice.
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

    Groups at their first update are not joined with others: torch's fused SGD refuses a mix of
    parameters with and without a momentum buffer. Groups that are sharded in different ways are not
    joined either: no foreach call accepts both.
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
