"""Placeholders in a checkpoint for optimizer state that does not exist yet.

Torch optimizers create a parameter's state at its first update. ``torch.distributed.checkpoint``
cannot read a checkpoint in which some states are missing. So each missing value is saved as zeros
(which take the space of one element), and its name is saved as well. When the checkpoint is loaded,
the named values are dropped, and the resumed run creates them at the first update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dynalora_optim._base.collectives import is_sharded, largest, local_part, zeros_like
from dynalora_optim.update._param_groups import ParamGroup, flatten

MARK = "unmaterialized"


def add_placeholders(
    packed: dict[str, Any],
    groups: Sequence[ParamGroup],
    names: Sequence[Sequence[str]],
    *,
    provisional: bool = False,
) -> list[dict[str, Any]]:
    """Add placeholders to a packed state dict; return their names, per group and by parameter.

    Args:
        packed: The wrapped optimizer's state dict, which is changed.
        groups: The param groups.
        names: The names of the parameters of each group.
        provisional: Whether the whole state counts as placeholders, because it was created only for
            a checkpoint (see `is_rehearsal`).
    """
    keys = [key for saved in packed["param_groups"] for key in saved["params"]]
    pairs = zip(keys, flatten(groups), strict=True)
    held = {key: p for key, p in pairs if packed["state"].get(key)}
    model = max(held, key=lambda key: len(packed["state"][key]), default=None)
    example = dict(packed["state"][model]) if model is not None else {}
    marks = []
    for group, own, saved in zip(groups, names, packed["param_groups"], strict=True):
        unreal: dict[str, list[str]] = {}
        for name, parameter, key in zip(own, group["params"], saved["params"], strict=True):
            values = packed["state"].get(key, {})
            zeros = {}
            if model is not None and parameter.requires_grad:
                zeros = _zeros(parameter, held[model], example)
            missing = {kind: zero for kind, zero in zeros.items() if kind not in values}
            if missing:
                packed["state"][key] = {**values, **missing}
            if absent := list(packed["state"].get(key, {}) if provisional else missing):
                unreal[name] = absent
        marks.append({MARK: unreal})
    return marks


def drop_placeholders(
    packed: Mapping[str, Any],
    marks: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """Return the packed state dict without the placeholders that ``marks``, one per group, name.

    ``names`` has the names of the parameters of each group, in their order.

    Raises:
        ValueError: States that were saved are missing.
    """
    state = dict(packed["state"])
    held: set[Any] = set()
    for group, own, mark in zip(packed["param_groups"], names, marks, strict=True):
        keys = dict(zip(own, group["params"], strict=True))
        held.update(keys.values())
        for name, unreal in mark[MARK].items():
            if name not in keys:
                raise ValueError(f"state_dict marks {name!r}, which its param group does not have.")
            values = state.pop(keys[name], {})
            if real := {kind: value for kind, value in values.items() if kind not in unreal}:
                state[keys[name]] = real
    present = held & state.keys()
    empty = [key for key in present if not state[key]]
    if 0 < len(empty) < len(present):
        raise ValueError(
            f"state_dict has empty states, such as for {empty[0]!r}. "
            "torch.distributed.checkpoint with flatten_optimizer_state_dict=True drops the state "
            "of parameters for which the loading optimizer has none yet; load into a newly built "
            "optimizer, call optimizer.state.clear() before, or do not use that option."
        )
    return {**packed, "state": state}


def is_rehearsal(groups: Sequence[ParamGroup], state: Mapping[Tensor, Any]) -> bool:
    """Return whether a step is not for training, but only to create the optimizer's state.

    ``torch.distributed.checkpoint`` calls such a step, to know what to read or write: all learning
    rates are 0, and every parameter has a gradient of zeros. To read the gradients waits for the
    device. So this is done only if all other conditions hold: in training, at most in the first
    step of a warm-up that starts at 0.
    """
    if any(state.values()) or not all(_is_zero_rate(group.get("lr", 0)) for group in groups):
        return False
    gradients = [p.grad for p in flatten(groups) if p.requires_grad]
    if any(gradient is None or gradient.is_sparse for gradient in gradients):
        return False
    found = any(bool(local_part(gradient).any()) for gradient in gradients if gradient is not None)
    if any(map(is_sharded, gradients)):
        found = bool(largest(int(found), groups[0]["params"][0].device))
    return not found


def _is_zero_rate(rate: float | Tensor | None) -> bool:
    # A rate on a device is the user's, because checkpointing makes a new one: do not wait for it.
    # Without a rate, the optimizer computes its own.
    return (
        rate is not None
        and not (isinstance(rate, Tensor) and rate.device.type != "cpu")
        and float(rate) == 0
    )


def _zeros(parameter: Tensor, model: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return zeros for ``parameter`` in the form of ``state`` of ``model``; {} if unknown."""
    zeros: dict[str, Any] = {}
    for kind, value in state.items():
        if isinstance(value, (Mapping, list, tuple)):
            return {}  # in a form that only the wrapped optimizer knows
        if not isinstance(value, Tensor):
            zeros[kind] = type(value)(0) if isinstance(value, (int, float)) else value
        elif value.ndim == 0:
            zeros[kind] = torch.zeros_like(value)
        elif value.shape == model.shape and type(local_part(value)) is Tensor:
            zeros[kind] = zeros_like(parameter, value.dtype)
        else:
            return {}  # factored (Adafactor) or quantised: the form cannot be derived
    return zeros
