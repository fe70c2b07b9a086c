"""The state dict: torch's own, with the allocation as one string in each param group.

``torch.distributed.checkpoint`` keeps only ``state`` and ``param_groups``. In a group it keeps any
string, but lists and dicts only if the loading optimizer has the same ones. In its flattened form
it drops each key that the loading optimizer's groups do not have. So all values that a resumed run
needs are JSON under one key, which the groups of the optimizer itself have too. The record is only
history: it is a separate entry of the state dict.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dynalora_optim.state._placeholders import MARK, drop_placeholders
from dynalora_optim.state._validate import check_value, damaged
from dynalora_optim.update._param_groups import PACKED, ParamGroup


def pack(packed: dict[str, Any], values: Sequence[Mapping[str, Any]]) -> None:
    """Put ``values``, one mapping per param group, into torch's state dict ``packed``."""
    for group, extra in zip(packed["param_groups"], values, strict=True):
        group[PACKED] = json.dumps(extra)


def unpack(
    packed: Mapping[str, Any], groups: Sequence[ParamGroup]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return torch's own part of the state dict ``packed``, and the values that `pack` added.

    Both are in the order of ``groups``; groups and their parameters are matched by name.

    Raises:
        ValueError: ``packed`` has other module groups, or parts of it are missing.
    """
    saved = _matched(packed["param_groups"], groups)
    values = [_values(group) for group in saved]
    lean = drop_placeholders({**packed, "param_groups": saved}, values)
    lean["param_groups"] = [{**group, PACKED: ""} for group in saved]
    return lean, values


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of one saved group; most of them are checked later."""
    try:
        values = json.loads(group[PACKED])
    except (TypeError, json.JSONDecodeError, RecursionError) as error:
        raise damaged(f"{type(error).__name__} in group {group['name']}") from error
    if not isinstance(values, dict):
        raise damaged(f"group {group['name']} packs a {type(values).__name__}")
    check_value(f"group {group['name']}", values, MARK)
    return values


def _matched(
    saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[ParamGroup]
) -> list[Mapping[str, Any]]:
    if any(not group.get(PACKED) for group in saved_groups):
        raise ValueError(
            f"state_dict lacks '{PACKED}' in some of its param_groups, where this optimizer keeps "
            "the allocation: it was saved without one, or torch.distributed.checkpoint has filled "
            "these groups from a plain optimizer's. Load a plain optimizer's state with "
            "load_state_dict(its state_dict()), or load it into the optimizer before wrapping."
        )
    for position, group in enumerate(saved_groups):
        if not isinstance(group.get("name"), str) or "param_names" not in group:
            raise damaged(f"param group {position} lacks its name, or those of its parameters")
    saved, ours = _keyed(saved_groups), _keyed(groups)
    if saved.keys() != ours.keys():
        raise _other_names(
            "module groups than this optimizer",
            missing={name for name, _ in ours.keys() - saved.keys()},
            unexpected={name for name, _ in saved.keys() - ours.keys()},
        )
    return [_reordered(saved[key], group) for key, group in ours.items()]


def _reordered(saved: Mapping[str, Any], group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the saved group with its parameters in the order of ``group``."""
    if saved["params"] == [*group["param_names"]]:
        names = group["param_names"]  # torch.distributed.checkpoint reorders "params" alone
    else:
        names = saved["param_names"]
    keys = dict(zip(names, saved["params"], strict=False))
    if keys.keys() != set(group["param_names"]) or len(keys) != len(saved["params"]):
        raise _other_names(
            f"parameters in group {group['name']}",
            missing=set(group["param_names"]) - keys.keys(),
            unexpected=keys.keys() - set(group["param_names"]),
        )
    return {
        **saved,
        "params": [keys[name] for name in group["param_names"]],
        "param_names": group["param_names"],
    }


def _keyed(groups: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Key groups by name and by their order among those of one name (with other options)."""
    keyed: dict[tuple[str, int], Mapping[str, Any]] = {}
    seen: Counter[str] = Counter()
    for group in groups:
        name = group["name"]
        keyed[name, seen[name]] = group
        seen[name] += 1
    return keyed


def _other_names(what: str, *, missing: set[str], unexpected: set[str]) -> ValueError:
    lists = [", ".join(sorted(names)[:5]) or "none" for names in (missing, unexpected)]
    return ValueError(
        f"state_dict holds other {what}; missing: {lists[0]}; unexpected: {lists[1]}. Build the "
        "model and the optimizer with the settings that they were saved with."
    )
