"""Float32 copies of low-precision weights, while these train.

An update of 1e-5 is lost in a bfloat16 weight of 1: the next larger bfloat16 is 1/128 away. So a
float32 copy is updated, and the model computes with the rounded copy (BAdam, arXiv 2404.02827).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynalora_optim._base.collectives import local_part
from dynalora_optim.update._param_groups import ParamGroup, State, flatten

MASTER = "master_weight"  # the copy's key in a parameter's state
LOW_PRECISION = (torch.bfloat16, torch.float16)
ROUNDING_BYTES = 20  # what `stochastically_rounded` takes for each number, at the most

Rounding: TypeAlias = Literal["nearest", "stochastic"]


class MasterWeights:
    """Keeps the copies in the optimizer's state, so that a checkpoint contains them.

    Args:
        rounding: How a copy is rounded to its weight when the module pauses. While the module
            trains, the weight is the ``"nearest"`` to the copy. ``"stochastic"`` rounding at the
            end keeps the mean, so that small changes in many short periods are not lost. None:
            there are no copies.
        seed: The seed of the stochastic rounding.
    """

    def __init__(self, rounding: Rounding | None, seed: int) -> None:
        self._rounding = rounding
        self._seed = seed

    @property
    def rounds_at_random(self) -> bool:
        """Whether copies are rounded at random when their module pauses."""
        return self._rounding == "stochastic"

    def check(self, optimizer: Optimizer) -> None:
        """Raise unless the rounding is valid, and can be used with ``optimizer``.

        Raises:
            ValueError: The rounding is unknown, or cannot be used with ``optimizer``.
        """
        rounding = self._rounding
        if rounding is None:
            return
        if rounding not in get_args(Rounding):
            raise ValueError(
                f"master_weights={rounding!r}: pass one of {', '.join(get_args(Rounding))}, None."
            )
        if callable(getattr(optimizer, "eval", None)):
            raise ValueError(
                f"master_weights={rounding!r} cannot be used with {type(optimizer).__name__}, "
                "which writes its own weights into the model; pass an optimizer such as AdamW."
            )
        halves = [p for p in flatten(optimizer.param_groups) if p.dtype == torch.float16]
        if rounding == "stochastic" and halves:
            raise ValueError(
                f"master_weights='stochastic' rounds to bfloat16, but {len(halves)} parameter(s) "
                "are float16; pass 'nearest', or load the model with dtype=torch.bfloat16."
            )

    @contextmanager
    def in_place(self, groups: Sequence[ParamGroup], state: State) -> Iterator[State]:
        """Put the copies into ``groups``, in place, for one update; yield the state of the copies.

        Afterwards the weights are set to the rounded copies. The lists in ``groups`` are changed,
        so that they must not be used elsewhere.
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
        their_state.update((k, v) for k, v in state.items() if not isinstance(k, Tensor))
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
        """Round and delete the copies of ``parameters``; ``number`` seeds the random rounding."""
        for position, parameter in enumerate(parameters):
            copy = state.get(parameter, {}).pop(MASTER, None)
            if copy is not None and self._rounding == "stochastic":
                generator = torch.Generator(parameter.device)
                seeds = random.Random(f"{self._seed}:{number}:{position}")
                generator.manual_seed(seeds.getrandbits(63))
                rounded = stochastically_rounded(local_part(copy), generator)
                local_part(parameter).copy_(rounded)


def _master_of(parameter: Tensor, state: State) -> Tensor:
    copy = state.get(parameter, {}).get(MASTER)
    return parameter.detach().float() if copy is None else copy


def stochastically_rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``x`` (float32) in bfloat16, rounded up or down at random so that the mean is x.

    A bfloat16 is the upper half of a float32. A random number of 16 bits is added to the lower
    half; the sum carries with a probability equal to the fraction. inf and nan do not change.
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
    """Undo the cast of ``load_state_dict``, which casts all state to its parameter's precision.

    This is done only if the run has copies. Without copies, the state has the precision of its
    parameter, as in torch.
    """
    keys = [key for group in packed["param_groups"] for key in group["params"]]
    if not any(MASTER in packed["state"].get(key, {}) for key in keys):
        return
    for key, parameter in zip(keys, flatten(groups), strict=True):
        for name, value in packed["state"].get(key, {}).items():
            if isinstance(value, Tensor) and value.dtype != state[parameter][name].dtype:
                state[parameter][name] = value.to(state[parameter][name].device)
