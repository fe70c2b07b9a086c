"""Parameters that are not wholly here: sharded over processes, offloaded, or without numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


def check_here(model: nn.Module) -> None:
    """Raise unless adapters can be put into ``model``: its weights are whole, and in memory.

    A model that is wholly on the meta device is accepted: it serves to measure, not to train.
    """
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if is_sharded(weight) or hasattr(weight, "ds_id"):
            raise ValueError(
                f"model has weights that are sharded over processes (such as {name}); call inject "
                f"or load_adapter first, then fully_shard(model)."
            )
    absent = [name for name, weight in weights.items() if weight.is_meta]
    if absent and (len(absent) < len(weights) or _is_offloaded(model)):
        raise ValueError(
            f"model has weights that are not in memory ({', '.join(absent[:3])} are on the meta "
            f"device): it was offloaded to a disk or a CPU, or not loaded. Adapters over them "
            f"would hold no numbers; load the model without offloading (no 'disk' and no 'cpu' "
            f"beside a GPU in device_map)."
        )


def check_numbers(tensors: Mapping[str, Tensor]) -> None:
    """Raise if a tensor that is to be read or written is on the meta device."""
    absent = sorted(name for name, tensor in tensors.items() if tensor.is_meta)
    if absent:
        raise ValueError(
            f"model has {', '.join(absent[:3])} on the meta device, without numbers; load the "
            f"model into memory first, without offloading."
        )


def check_not_fsdp1(model: nn.Module) -> None:
    """Raise if a part of the model is wrapped by the first version of FSDP."""
    for name, module in model.named_modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ValueError(
                f"model is wrapped in FullyShardedDataParallel (at {name or 'its root'}), which "
                f"hides the parameters and their names; use FSDP2, fully_shard(model), instead."
            )


def _is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate brings the weights in for each forward pass."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def is_sharded(tensor: object) -> bool:
    """Whether this is a DTensor, of which each process holds a part."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def settle(model: nn.Module) -> None:
    """Let FSDP2 put its shards back, which it replaces by whole weights during a step."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if callable(reshard) and hasattr(module, "unshard"):
            reshard()


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor, put together from all processes, which must all call this."""
    gathered: Any = tensor
    return gathered.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Copy ``source`` into ``target``, or this process's part of it."""
    if not is_sharded(target):
        target.copy_(source)
        return
    from torch.distributed.tensor import distribute_tensor

    into: Any = target
    source = source.to(into.to_local().device, into.dtype)
    into.copy_(distribute_tensor(source, into.device_mesh, into.placements, src_data_rank=None))


def write_once(write: Callable[[], None], *, sharded: bool) -> None:
    """Call ``write`` on one process if the model is sharded. All wait, and raise what it raises."""
    if not sharded:
        write()
        return
    failure: list[OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            write()
        except OSError as error:
            failure = [error]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]
