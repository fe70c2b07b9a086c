"""State dicts of a plain optimizer, which is not wrapped: they have the user's own param groups.

The wrapper splits the user's groups by module. This file maps the parameters of one form to the
other, so that a run can start with plain fine-tuning and continue with an allocation, or the other
way round.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dynalora_optim._base.torch_private import ORIGINAL
from dynalora_optim.update._param_groups import PACKED, ParamGroup

_OURS = ("params", "name", "param_names", "user_name", PACKED)
# State that has the shape of its parameter in every torch optimizer.
_SHAPED = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum", "prev")


@dataclass(frozen=True)
class UserGroup:
    """One param group as the user gave it.

    Attributes:
        names: The model's names of its parameters, in the user's order.
        has_names: Whether the user named the parameters, so that a state dict has the names.
    """

    names: tuple[str, ...]
    has_names: bool


def is_plain(packed: Mapping[str, Any], groups: Sequence[ParamGroup]) -> bool:
    """Return whether ``packed`` is the state dict of an optimizer that is not wrapped."""
    saved = packed["param_groups"]
    ours = [group["name"] for group in groups]
    return not any(
        PACKED in group or group.keys() <= {"params"} or group.get("name") in ours
        for group in saved
    )


def from_plain(
    packed: Mapping[str, Any],
    groups: Sequence[ParamGroup],
    lines: Sequence[int],
    users: Sequence[UserGroup],
) -> dict[str, Any]:
    """Return a plain optimizer's state dict with its groups split as ``groups`` are.

    Args:
        packed: The plain optimizer's ``state_dict()``.
        groups: The param groups of the wrapper.
        lines: Per param group, the number of the user's group that it was split from.
        users: The user's groups.

    Raises:
        ValueError: ``packed`` has other groups, parameters or shapes.
    """
    saved = packed["param_groups"]
    if len(saved) != len(users):
        raise ValueError(
            f"state_dict has {len(saved)} param groups, but the wrapped optimizer was given "
            f"{len(users)}. Build it with the groups of the one that was saved."
        )
    keys = [_keys(i, group, user) for i, (group, user) in enumerate(zip(saved, users, strict=True))]
    for group, line in zip(groups, lines, strict=True):
        _check_shapes(group, keys[line], packed["state"])
    return {
        **packed,
        "param_groups": [
            _piece(group, saved[line], keys[line])
            for group, line in zip(groups, lines, strict=True)
        ],
    }


def user_groups(
    groups: Sequence[ParamGroup], lines: Sequence[int], users: Sequence[UserGroup]
) -> list[ParamGroup]:
    """Return the user's groups with the current parameters and options.

    If the pieces of a group now differ in an option, the group gets the first piece's value.
    """
    found = []
    for number, user in enumerate(users):
        pieces = [group for group, line in zip(groups, lines, strict=True) if line == number]
        parameters = _by_name(pieces)
        options = {key: value for key, value in pieces[0].items() if key not in _OURS}
        if "user_name" in pieces[0]:
            options["name"] = pieces[0]["user_name"]
        if user.has_names:
            options["param_names"] = list(user.names)
        found.append({**options, "params": [parameters[name] for name in user.names]})
    return found


def to_plain(
    groups: Sequence[ParamGroup],
    lines: Sequence[int],
    users: Sequence[UserGroup],
    state: Mapping[Tensor, Any],
) -> dict[str, Any]:
    """Return the state dict of the wrapped optimizer, as if it had trained without the wrapper.

    Raises:
        ValueError: Param groups that were split from one group now differ in an option.
    """
    packed: dict[str, Any] = {"state": {}, "param_groups": []}
    count = 0
    for number, user in enumerate(users):
        pieces = [group for group, line in zip(groups, lines, strict=True) if line == number]
        parameters = _by_name(pieces)
        group = _common_options(number, pieces)
        if "user_name" in pieces[0]:
            group["name"] = pieces[0]["user_name"]
        if user.has_names:
            group["param_names"] = list(user.names)
        group["params"] = list(range(count, count + len(user.names)))
        for key, name in zip(group["params"], user.names, strict=True):
            if state.get(parameters[name]):
                packed["state"][key] = state[parameters[name]]
        packed["param_groups"].append(group)
        count += len(user.names)
    return packed


def _keys(number: int, saved: Mapping[str, Any], user: UserGroup) -> dict[str, Any]:
    """Return the key of each parameter in the saved state, by its name here."""
    names = [_bare(name) for name in saved.get("param_names", user.names)]
    if set(names) != set(user.names):
        raise ValueError(
            f"param group {number} of state_dict has other parameters; "
            f"missing: {_some(set(user.names) - set(names))}; "
            f"unexpected: {_some(set(names) - set(user.names))}."
        )
    if len(saved["params"]) != len(user.names):
        raise ValueError(
            f"param group {number} of state_dict has {len(saved['params'])} parameters, but the "
            f"wrapped optimizer was given {len(user.names)} there: {_some(user.names)}. Build the "
            "optimizer from the parameters that the saved one was built from, in their order."
        )
    return dict(zip(names, saved["params"], strict=True))


def _bare(name: str) -> str:
    """Return a name without the parts that DistributedDataParallel and torch.compile add."""
    return name.removeprefix("module.").replace(f"{ORIGINAL}.", "")


def _check_shapes(
    group: ParamGroup, keys: Mapping[str, Any], state: Mapping[Any, Mapping[str, Any]]
) -> None:
    for name, parameter in zip(group["param_names"], group["params"], strict=True):
        for kind, value in state.get(keys[name], {}).items():
            if kind in _SHAPED and isinstance(value, Tensor) and value.shape != parameter.shape:
                raise ValueError(
                    f"state_dict has {kind} of shape {tuple(value.shape)} for {name}, whose shape "
                    f"is {tuple(parameter.shape)}: it was saved for another model, or for "
                    "parameters in another order."
                )


def _piece(group: ParamGroup, saved: Mapping[str, Any], keys: Mapping[str, Any]) -> ParamGroup:
    """Return ``group`` with the options of the saved group of which it is a piece."""
    options = {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in saved.items()
        if key not in _OURS
    }
    if "name" in saved:
        options["user_name"] = saved["name"]
    return {**group, **options, "params": [keys[name] for name in group["param_names"]]}


def _by_name(pieces: Iterable[ParamGroup]) -> dict[str, Tensor]:
    return {
        name: parameter
        for piece in pieces
        for name, parameter in zip(piece["param_names"], piece["params"], strict=True)
    }


def _common_options(number: int, pieces: Sequence[ParamGroup]) -> ParamGroup:
    first = pieces[0]
    for piece in pieces[1:]:
        for key, value in piece.items():
            if key not in _OURS and (key not in first or bool(value != first[key])):
                raise ValueError(
                    f"your param group {number} no longer has one value of {key}: "
                    f"{first['name']} has {first.get(key)!r}, {piece['name']} has {value!r}. A "
                    "plain optimizer has one value per group; make them equal first."
                )
    return {key: value for key, value in first.items() if key not in _OURS}


def _some(names: Collection[str], most: int = 5) -> str:
    return ", ".join(sorted(names)[:most]) + (", ..." if len(names) > most else "") or "none"
