"""Float32 copies of low-precision weights, for as long as they train.

An update of 1e-5 is lost in a bfloat16 weight of 1: its neighbours are 1/128 apart. So the update
goes to a float32 copy, whose rounding is what the model computes with (BAdam, arXiv 2404.02827).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynalora_optim.update._param_groups import ParamGroup, flatten

MASTER = "master_weight"  # its key in a parameter's state
LOW_PRECISION = (torch.bfloat16, torch.float16)

Rounding: TypeAlias = Literal["nearest", "stochastic"]
State: TypeAlias = "MutableMapping[Tensor, dict[str, Any]]"


class MasterWeights:
    """Keeps the copies in the optimizer's state, where a checkpoint finds them.

    Args:
        rounding: How a weight ends when its module pauses. While it trains it is the nearest to
            its copy; a ``"stochastic"`` end keeps the copy's mean, so that what many short periods
            add is not lost. None: there are no copies.
        seed: Of the stochastic rounding.
    """

    def __init__(self, rounding: Rounding | None, seed: int) -> None:
        self._rounding = rounding
        self._seed = seed

    def check(self, optimizer: Optimizer) -> None:
        """Raise unless the rounding is one of the two or None, and goes with ``optimizer``.

        Raises:
            ValueError: It does not.
        """
        rounding = self._rounding
        if rounding is None:
            return
        if rounding not in get_args(Rounding):
            raise ValueError(
                f"master_weights={rounding!r} is none of {', '.join(get_args(Rounding))}, None."
            )
        if callable(getattr(optimizer, "eval", None)):
            raise ValueError(
                f"master_weights={rounding!r} does not go with {type(optimizer).__name__}, which "
                "puts weights of its own into the model; pass an optimizer such as AdamW."
            )
        halves = [p for p in flatten(optimizer.param_groups) if p.dtype == torch.float16]
        if rounding == "stochastic" and halves:
            raise ValueError(
                f"master_weights='stochastic' rounds to bfloat16, but {len(halves)} parameter(s) "
                "are float16; pass 'nearest', or load the model with dtype=torch.bfloat16."
            )

    @contextmanager
    def in_place(self, groups: Sequence[ParamGroup], state: State) -> Iterator[State]:
        """Put the copies into ``groups``, in place, for one update; yield the state to update with.

        Afterwards the weights follow. ``groups`` must be the caller's own.
        """
        copies = {
            parameter: _master_of(parameter, state)
            for parameter in (flatten(groups) if self._rounding else ())
            if parameter.dtype in LOW_PRECISION and parameter.grad is not None
        }
        if not copies:
            yield state
            return
        owners = {copy: parameter for parameter, copy in copies.items()}
        their_state: State = type(state)(dict)  # type: ignore[call-arg]
        for parameter in flatten(groups):
            values = state.get(parameter, {})
            if parameter in copies:
                values = {key: value for key, value in values.items() if key != MASTER}
            if values:
                their_state[copies.get(parameter, parameter)] = values
        for group in groups:
            group["params"] = [copies.get(parameter, parameter) for parameter in group["params"]]
        for parameter, copy in copies.items():
            assert parameter.grad is not None
            copy.grad = parameter.grad.float()
        yield their_state
        for group in groups:
            group["params"] = [owners.get(held, held) for held in group["params"]]
        for held, values in their_state.items():
            state[owners.get(held, held)] = values
        for parameter, copy in copies.items():
            copy.grad = None
            state[parameter][MASTER] = copy
            parameter.copy_(copy)

    def write_back(self, state: State, parameters: Iterable[Tensor], *, number: int) -> None:
        """End the copies of ``parameters``, which pause from selection ``number`` on."""
        for position, parameter in enumerate(parameters):
            copy = state.get(parameter, {}).pop(MASTER, None)
            if copy is not None and self._rounding == "stochastic":
                generator = torch.Generator(parameter.device)
                of_its_own = random.Random(f"{self._seed}:{number}:{position}")
                generator.manual_seed(of_its_own.getrandbits(63))
                parameter.copy_(stochastically_rounded(copy, generator))


def _master_of(parameter: Tensor, state: State) -> Tensor:
    copy = state.get(parameter, {}).get(MASTER)
    return parameter.detach().float() if copy is None else copy


def stochastically_rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``x`` (float32) in bfloat16, up or down by chance, so that the mean is x.

    A bfloat16 is the upper half of a float32: a random number of 16 bits is added to the lower
    half, and carries with the probability that it stands for. inf and nan stay what they are.
    """
    bits = x.view(torch.int32)
    noise = torch.randint(
        0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32
    )
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def restore_dtypes(
    state: Mapping[Tensor, Any], groups: Sequence[ParamGroup], packed: Mapping[str, Any]
) -> None:
    """Undo the cast of ``load_state_dict``, which puts all state into its parameter's precision.

    Only of a run with copies: without, torch's rules want state as precise as the parameter.
    """
    if not any(MASTER in values for values in packed["state"].values()):
        return
    keys = (key for group in packed["param_groups"] for key in group["params"])
    for key, parameter in zip(keys, flatten(groups), strict=True):
        for name, value in packed["state"].get(key, {}).items():
            if isinstance(value, Tensor) and value.dtype != state[parameter][name].dtype:
                state[parameter][name] = value.to(state[parameter][name].device)
