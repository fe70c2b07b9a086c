"""Communication between processes that train together, so that all have the same scores and choice.

A single process does not communicate. With several, the functions that communicate are collectives:
all ranks must call them at the same point. They do so because all ranks count the same optimizer
steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def has_process_group() -> bool:
    """Return whether there is a process group; without one, nothing is sharded."""
    return distributed.is_available() and distributed.is_initialized()


def world_size() -> int:
    """Return how many processes train together; 1 without a process group."""
    return distributed.get_world_size() if has_process_group() else 1


def is_sharded(tensor: object) -> bool:
    """Return whether ``tensor`` is a DTensor; ``fully_shard`` turns parameters into these."""
    return hasattr(tensor, "full_tensor")


def is_fully_sharded(module: object) -> bool:
    """Return whether ``fully_shard`` (FSDP2) was called on ``module``."""
    return hasattr(module, "set_requires_gradient_sync")


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` that this rank holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, gathered from all ranks; every rank must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def zeros_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros with the shape and sharding of ``tensor``.

    They are one expanded zero, so that they take the space of one element in memory and in a file.
    """
    part = local_part(tensor)
    zeros = part.new_zeros((), dtype=dtype).expand(part.shape)
    if not is_sharded(tensor):
        return zeros
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        zeros,
        tensor.device_mesh,  # type: ignore[attr-defined]
        tensor.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def total(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over all ranks, without waiting for their device."""
    if world_size() > 1:
        distributed.all_reduce(values)
    return values


def largest(value: int, device: torch.device) -> int:
    """Return the largest ``value`` over all ranks."""
    if world_size() == 1:
        return value
    found = torch.tensor([value], device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return int(found)


def differs(value: Tensor) -> bool:
    """Return whether the scalar ``value`` differs between ranks; False if one is nan or inf."""
    if world_size() == 1:
        return False
    found = torch.stack([value, -value])
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    high, low = found.tolist()
    return math.isfinite(high) and math.isfinite(low) and high != -low


def gathered(value: T) -> list[T]:
    """Return the ``value`` of each rank, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def gathered_numbers(values: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return the ``values`` of each rank, which are equally many, in the order of the ranks."""
    if world_size() == 1:
        return [list(values)]
    own = torch.tensor(values, device=device)
    found = [torch.empty_like(own) for _ in range(world_size())]
    distributed.all_gather(found, own)
    return torch.stack(found).tolist()


def number_of(value: object) -> int:
    """Return a number that is the same for values of one ``repr``, and else surely is not."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")


def check_agreement(what: str, value: object, device: torch.device) -> None:
    """Raise on every rank if ``value`` is not the same on all ranks.

    Raises:
        RuntimeError: The ranks disagree.
    """
    if world_size() == 1:
        return
    number = number_of(value)
    found = torch.tensor([number, -number], device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    if found[0] != -found[1]:
        raise RuntimeError(
            f"the ranks disagree on {what}: rank {distributed.get_rank()} has {value!r}. Every "
            "rank must build the model and the optimizer with the same arguments and load the same "
            "checkpoint; an allocator, schedule or measure of your own must not depend on the rank."
        )
