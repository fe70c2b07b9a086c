"""Optimizer state of modules that pause, or have not been active yet.

Torch optimizers create a parameter's state at its first update. A checkpoint that lacks some states
cannot be read by ``torch.distributed.checkpoint``, so each absent one is saved as zeros and marked,
and a marked one is left out again when it is loaded: the resumed run creates it as the other would.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynalora_optim._param_groups import ParamGroup

MARK = "dynalora_unmaterialized"
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")  # of all of torch's optimizers

OnActivate: TypeAlias = Literal["keep", "reset_momentum", "reset"]


def check_on_activate(on_activate: object, optimizer: Optimizer) -> None:
    """Raise unless it is one of the three, and ``optimizer`` can do it.

    Raises:
        ValueError: It is not, or cannot.
    """
    if on_activate not in get_args(OnActivate):
        raise ValueError(
            f"on_activate={on_activate!r} is not one of {', '.join(get_args(OnActivate))}."
        )
    if on_activate == "reset" and isinstance(optimizer, torch.optim.Adagrad):
        raise ValueError(
            "on_activate='reset' deletes a state that Adagrad makes only when it is built; pass "
            "'keep', or another optimizer."
        )


def reset(
    state: MutableMapping[Tensor, Any], parameters: Iterable[Tensor], how: OnActivate
) -> None:
    """Forget the state of ``parameters``, or its first moment only, when they become active again.

    Kept momentum goes on in the direction of before the pause: after 100 unit gradients, Adam's
    first step on a gradient of -1 still moves 0.8 lr the old way.
    """
    for parameter in parameters if how != "keep" else ():
        if how == "reset":
            state.pop(parameter, None)
        for key in FIRST_MOMENTS:
            moment = state.get(parameter, {}).get(key)
            if moment is not None:
                moment.zero_()


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
