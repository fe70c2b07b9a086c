"""Optimizer state of modules that have not been active yet: absent in memory, zeros on disk.

Torch optimizers create a parameter's state at its first update. A checkpoint that lacks some states
cannot be read by ``torch.distributed.checkpoint``, so each absent one is saved as zeros and marked,
and a marked one is left out again when it is loaded: the resumed run creates it as the other would.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynalora_optim._param_groups import ParamGroup

MARK = "dynalora_unmaterialized"


def add_placeholders(
    packed: dict[str, Any], groups: list[ParamGroup], state: Mapping[Tensor, Any]
) -> None:
    """Fill the gaps of a packed state dict, and mark their positions in its param groups."""
    template = next(
        ((p, state[p]) for group in groups for p in group["params"] if state.get(p)), None
    )
    for group, saved in zip(groups, packed["param_groups"], strict=True):
        saved[MARK] = []
        for position, (parameter, key) in enumerate(
            zip(group["params"], saved["params"], strict=True)
        ):
            if template is None or key in packed["state"] or not parameter.requires_grad:
                continue
            zeros = _zeros(parameter, *template)
            if zeros is not None:
                packed["state"][key] = zeros
                saved[MARK].append(position)


def drop_placeholders(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the packed state dict without what `add_placeholders` added."""
    marked = {
        group["params"][position]
        for group in packed["param_groups"]
        for position in group.get(MARK, [])
    }
    return {
        **packed,
        "state": {key: value for key, value in packed["state"].items() if key not in marked},
        "param_groups": [
            {key: value for key, value in group.items() if key != MARK}
            for group in packed["param_groups"]
        ],
    }


def _zeros(parameter: Tensor, model: Tensor, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Zeros shaped for ``parameter`` as ``state`` is for ``model``; None if that is unknown."""
    zeros: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            zeros[key] = type(value)(0) if isinstance(value, (int, float)) else value
        elif value.shape == model.shape and value.ndim > 0:
            zeros[key] = torch.zeros_like(parameter, dtype=value.dtype)
        elif value.ndim == 0:
            zeros[key] = torch.zeros_like(value)
        else:
            return None  # a factored state (Adafactor): its shape cannot be told from this one
    return zeros
