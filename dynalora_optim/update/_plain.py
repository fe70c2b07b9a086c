"""State dicts of a plain optimizer, which is not wrapped: they say nothing of an allocation.

So a run can start with plain fine-tuning and continue with an allocation, or the other way round.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dynalora_optim._base.torch_private import ORIGINAL
from dynalora_optim.update._param_groups import PACKED, ParamGroup

# State that has the shape of its parameter in every torch optimizer.
_SHAPED = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum", "prev")


def is_plain(packed: Mapping[str, Any]) -> bool:
    """Return whether ``packed`` is the state dict of an optimizer that is not wrapped."""
    return "record" not in packed and not any(group.get(PACKED) for group in packed["param_groups"])


def from_plain(
    packed: Mapping[str, Any],
    groups: Sequence[ParamGroup],
    names: Sequence[Sequence[str]],
    optimizer: Optimizer,
) -> dict[str, Any]:
    """Return a plain optimizer's state dict with its parameters in the order of ``groups``.

    Args:
        packed: The plain optimizer's ``state_dict()``.
        groups: The param groups to load it into.
        names: The model's names of the parameters of each group.
        optimizer: The wrapped optimizer.

    Raises:
        ValueError: ``packed`` has other groups, parameters or shapes.
    """
    saved = packed["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(
            f"state_dict has {len(saved)} param groups, but the wrapped optimizer was given "
            f"{len(groups)}. Build it with the groups of the one that was saved."
        )
    keys = [_keys(number, group, names[number]) for number, group in enumerate(saved)]
    # In other optimizers, such as GaLore, moments have shapes of their own.
    if type(optimizer).__module__.startswith("torch.optim."):
        for group, own, by_name in zip(groups, names, keys, strict=True):
            _check_shapes(group, own, by_name, packed["state"])
    return {
        **packed,
        "param_groups": [
            {**group, "params": [by_name[name] for name in own]}
            for group, own, by_name in zip(saved, names, keys, strict=True)
        ],
    }


def check_alike(
    groups: Sequence[ParamGroup], own: Sequence[Mapping[str, Mapping[str, Any]]]
) -> None:
    """Raise unless a plain optimizer can continue with ``groups``.

    Args:
        groups: The user's param groups.
        own: For each of these, the numbers of its modules that differ from the group's.

    Raises:
        ValueError: Modules of one group have had different numbers of updates, and the wrapped
            optimizer counts these in its groups.
    """
    for number, by_name in enumerate(own):
        for name, values in by_name.items():
            key = next(iter(values))
            raise ValueError(
                f"your param group {number} has no single value of {key}: in {name} it is "
                f"{values[key]!r}, in the group {groups[number].get(key)!r}, because modules were "
                "active at different times. A plain optimizer has one value per group, so that it "
                "cannot continue this run."
            )


def _keys(number: int, saved: Mapping[str, Any], own: Sequence[str]) -> dict[str, Any]:
    """Return the key of each parameter in the saved state, by its name here."""
    names = [_bare(name) for name in saved.get("param_names", own)]
    if set(saved["params"]) == set(own):  # torch.distributed.checkpoint uses names as keys
        names = list(saved["params"])
    if set(names) != set(own):
        raise ValueError(
            f"param group {number} of state_dict has other parameters; "
            f"missing: {_some(set(own) - set(names))}; "
            f"unexpected: {_some(set(names) - set(own))}."
        )
    if len(saved["params"]) != len(own):
        raise ValueError(
            f"param group {number} of state_dict has {len(saved['params'])} parameters, but the "
            f"wrapped optimizer was given {len(own)} there: {_some(own)}. Build the "
            "optimizer from the parameters that the saved one was built from, in their order."
        )
    return dict(zip(names, saved["params"], strict=True))


def _bare(name: str) -> str:
    """Return a name without the parts that DistributedDataParallel and torch.compile add."""
    return name.removeprefix("module.").replace(f"{ORIGINAL}.", "")


def _check_shapes(
    group: ParamGroup,
    names: Sequence[str],
    keys: Mapping[str, Any],
    state: Mapping[Any, Mapping[str, Any]],
) -> None:
    for name, parameter in zip(names, group["params"], strict=True):
        for kind, value in state.get(keys[name], {}).items():
            if kind in _SHAPED and isinstance(value, Tensor) and value.shape != parameter.shape:
                raise ValueError(
                    f"state_dict has {kind} of shape {tuple(value.shape)} for {name}, whose shape "
                    f"is {tuple(parameter.shape)}: it was saved for another model, or for "
                    "parameters in another order."
                )


def _some(names: Collection[str], most: int = 5) -> str:
    return ", ".join(sorted(names)[:most]) + (", ..." if len(names) > most else "") or "none"
