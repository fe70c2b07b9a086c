"""The state that an optimizer creates, found by an update of copies, before training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynalora_optim._base.collectives import local_part
from dynalora_optim.update._param_groups import LINE, ParamGroup, State
from dynalora_optim.update._rule import UpdateRule

_QUANTISED = 4096  # elements; 8-bit optimizers keep smaller states in 32 bits
_STEPS = 2  # some optimizers create a part of their state at the second update


def new_states(rule: UpdateRule) -> Iterator[Mapping[str, Any]]:
    """Yield, for each param group, the state that the rule creates for a copy of a parameter.

    Neither the optimizer nor torch's random numbers change. The update may raise any error.
    """
    for line, group in enumerate(rule.optimizer.param_groups):
        if group["params"]:
            yield _new_state(rule, line, group)


def recreated(rule: UpdateRule, option: str) -> list[Mapping[str, Any]]:
    """Return the `new_states` of a rule whose state ``option`` deletes; none if they are not known.

    Raises:
        ValueError: The optimizer creates its state only when it is built.
    """
    try:
        return list(new_states(rule))
    except KeyError:
        raise ValueError(
            f"Pause({option}) deletes state that {type(rule.optimizer).__name__} creates only when "
            "it is built; pass 'keep', or another optimizer."
        ) from None
    except Exception:  # others need more than gradients, such as second derivatives
        return []


def _new_state(rule: UpdateRule, line: int, group: ParamGroup) -> Mapping[str, Any]:
    own = local_part(_typical(group["params"]).detach())
    copy = nn.Parameter(own.clone())
    piece = {**group, "params": [copy], "name": "", "positions": [0], LINE: line}
    state: State = defaultdict(dict)
    devices = [own.device] if own.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        for _ in range(_STEPS):
            copy.grad = torch.ones_like(copy)
            rule.rehearse([piece], state)
    return state[copy]


def _typical(parameters: Sequence[Tensor]) -> Tensor:
    """Return the smallest of the parameters that are large enough for 8 bits, or the largest."""
    large = [p for p in parameters if p.numel() >= _QUANTISED]
    return min(large, key=Tensor.numel) if large else max(parameters, key=Tensor.numel)
