"""A copy of a model on the meta device, quantised weights included."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def meta_copy(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device, without its weights; tied parameters stay tied."""
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    quantised = []
    for parameter in model.parameters():
        more = list(companions(parameter))
        plain = parameter.as_subclass(Tensor) if more else parameter
        on_meta = nn.Parameter(plain.detach().to("meta"), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = on_meta
        if more:
            memo |= {id(tensor): tensor.detach().to("meta") for tensor in more}
            memo[id(parameter)] = on_meta.detach().as_subclass(type(parameter))
            quantised.append(parameter)
    copied = copy.deepcopy(model, memo)
    for parameter in quantised:  # they refer to their module
        for name, value in vars(parameter).items():
            setattr(memo[id(parameter)], name, copy.deepcopy(value, memo))
    return copied


def companions(parameter: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a quantised weight has beside its own: bitsandbytes' scales."""
    yield from _tensors_of(vars(parameter).get("quant_state"))


def _tensors_of(state: object) -> Iterator[Tensor]:
    for value in getattr(state, "__dict__", {}).values():
        if isinstance(value, Tensor):
            yield value
        else:
            yield from _tensors_of(value)  # the scales of the scales
