"""The state dict: the wrapped optimizer's own, with the allocation as a string in its groups.

``torch.distributed.checkpoint`` keeps only ``state`` and ``param_groups``. In a group it keeps any
string, but lists and dicts only if the loading optimizer has the same ones. In its flattened form
it drops each key that the loading optimizer's groups do not have. So all values that a resumed run
needs are JSON under one key, which the groups of the optimizer itself have too. The record is only
history: it is a separate entry of the state dict.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dynalora_optim.state._placeholders import MARK, drop_placeholders
from dynalora_optim.state._validate import check_value, damaged
from dynalora_optim.update._param_groups import PACKED

NAMES = "param_names"  # of the parameters of a group, in their order
_TENSOR = "tensor of"
_NUMBER = "number"  # of a tensor: modules that share one are updated together
_Pair = tuple[Mapping[str, Any], dict[str, Any]]


def pack(packed: dict[str, Any], values: Sequence[Mapping[str, Any]]) -> None:
    """Put ``values``, one mapping per param group, into the state dict ``packed``."""
    numbers: dict[int, int] = {}
    for group, extra in zip(packed["param_groups"], values, strict=True):
        group[PACKED] = json.dumps(extra, default=partial(_as_json, numbers))


def unpack(
    packed: Mapping[str, Any], names: Sequence[Sequence[str]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the wrapped optimizer's part of the state dict, and the values that `pack` added.

    Both are in the order of ``names``, the names of the parameters of each group; groups and their
    parameters are matched by name.

    Raises:
        ValueError: ``packed`` has other parameters, or parts of it are missing.
    """
    pairs = _with_values(packed)
    matched = _matched(pairs, names)
    saved = [_reordered(*pair, own) for pair, own in zip(matched, names, strict=True)]
    values = [found for _, found in matched]
    lean = drop_placeholders({**packed, "param_groups": saved}, values, names)
    lean["param_groups"] = [{**group, PACKED: ""} for group in saved]
    lean.pop("record", None)
    return lean, values


def _with_values(packed: Mapping[str, Any]) -> list[_Pair]:
    """Return each saved group with its values; most of them are checked later."""
    tensors: dict[int, Tensor] = {}
    return [(g, _values(i, g, tensors)) for i, g in enumerate(packed["param_groups"])]


def _values(position: int, group: Mapping[str, Any], tensors: dict[int, Tensor]) -> dict[str, Any]:
    if not group.get(PACKED):
        raise ValueError(
            f"state_dict lacks '{PACKED}' in param group {position}, where this optimizer keeps "
            "the allocation: it was saved without one. Load a plain optimizer's state with "
            "load_state_dict(its state_dict()), or load it into the optimizer before wrapping."
        )
    try:
        values = json.loads(group[PACKED], object_hook=partial(_from_json, tensors))
    except (TypeError, ValueError, RecursionError, AttributeError) as error:
        raise damaged(f"{type(error).__name__} in param group {position}") from error
    if not isinstance(values, dict):
        raise damaged(f"param group {position} packs a {type(values).__name__}")
    for key in (NAMES, MARK, "modules"):
        check_value(f"param group {position}", values, key)
    return values


def _matched(pairs: Sequence[_Pair], names: Sequence[Sequence[str]]) -> list[_Pair]:
    by_names = {frozenset(values[NAMES]): (group, values) for group, values in pairs}
    saved = set().union(*by_names)
    ours = {name for own in names for name in own}
    if saved != ours:
        raise _other_names(
            "parameters than this optimizer", missing=ours - saved, unexpected=saved - ours
        )
    if len(by_names) != len(names) or not all(frozenset(own) in by_names for own in names):
        raise ValueError(
            f"state_dict has these parameters in other param groups: {len(pairs)}, here "
            f"{len(names)}. Build the optimizer with the groups of the one that was saved."
        )
    return [by_names[frozenset(own)] for own in names]


def _reordered(
    saved: Mapping[str, Any], values: Mapping[str, Any], own: Sequence[str]
) -> dict[str, Any]:
    """Return the saved group with its parameters in the order of ``own``."""
    # torch.distributed.checkpoint uses names as keys, and reorders them.
    names = own if saved["params"] == [*own] else values[NAMES]
    keys = dict(zip(names, saved["params"], strict=False))
    if keys.keys() != set(own) or len(keys) != len(saved["params"]):
        raise _other_names(
            "parameters in a param group",
            missing=set(own) - keys.keys(),
            unexpected=keys.keys() - set(own),
        )
    group = {**saved, "params": [keys[name] for name in own]}
    if "param_names" in saved:
        given = dict(zip(values[NAMES], saved["param_names"], strict=False))
        group["param_names"] = [given.get(name, name) for name in own]
    return group


def _other_names(what: str, *, missing: Collection[str], unexpected: Collection[str]) -> ValueError:
    lists = [", ".join(sorted(names)[:5]) or "none" for names in (missing, unexpected)]
    return ValueError(
        f"state_dict holds other {what}; missing: {lists[0]}; unexpected: {lists[1]}. Build the "
        "model and the optimizer with the settings that they were saved with."
    )


def _as_json(numbers: dict[int, int], value: object) -> object:
    """Return a tensor that the wrapped optimizer stores in its groups as JSON."""
    if isinstance(value, Tensor):
        number = numbers.setdefault(id(value), len(numbers))
        dtype = str(value.dtype).removeprefix("torch.")
        return {_TENSOR: dtype, "values": value.tolist(), _NUMBER: number}
    raise TypeError(
        f"the wrapped optimizer stores a {type(value).__name__} in its param groups, with another "
        "value in each module, which a state dict cannot hold"
    )


def _from_json(tensors: dict[int, Tensor], value: dict[str, Any]) -> Any:
    if _TENSOR not in value:
        return value
    tensor = torch.tensor(value["values"], dtype=getattr(torch, value[_TENSOR]))
    # Files of older versions have no numbers.
    return tensors.setdefault(value[_NUMBER], tensor) if _NUMBER in value else tensor
