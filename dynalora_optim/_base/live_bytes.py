"""Counting what a computation holds: the bytes of live tensors, their peak, and FLOPs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from dynalora_optim._base.torch_private import (
    QUERY_POSITIONS,
    TorchDispatchMode,
    packet_of,
    storage_key,
    tree_leaves,
)

# torch's registry has no entry for these, although they compute as much.
_IN_PLACE: dict[Any, Any] = {
    torch.ops.aten.addmm_: torch.ops.aten.addmm,
    torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm,
}


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which every tensor storage that is created is counted until it is freed.

    It works the same way on every device and is exact to the byte: it does not include the rounding
    and the cache of a memory allocator. Its peak corresponds to the one that
    ``torch.cuda.max_memory_allocated`` reports. Tensors that existed before are not counted.

    Args:
        meta: Count the tensors of the meta device too, as if they took memory.

    Attributes:
        live: The bytes of the counted storages that are alive now.
        peak: The most ``live`` has been since the beginning or `restart`.
        flops: The floating-point operations since the beginning or `restart` (products of matrices
            and convolutions, a multiply-add as two, as ``torch.utils.flop_counter`` counts them;
            and products that are added in place, which it leaves out).
        ops: The number of operations dispatched since the beginning or `restart`.

    Example:
        >>> with LiveBytes() as memory:  # doctest: +SKIP
        ...     model(**batch).loss.backward()
        >>> memory.peak  # doctest: +SKIP
    """

    def __init__(self, *, meta: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._uncounted = () if meta else ("meta",)
        self.live = 0
        self._known: set[int] = set()
        self.restart()

    def restart(self) -> None:
        """Reset the peak and the operation counts; storages that are alive stay counted."""
        self.peak = self.live
        self.flops = 0
        self.ops = 0

    def size(self, tensors: Iterable[Tensor]) -> int:
        """Return the bytes of the counted storages among those of ``tensors``, each once."""
        sizes = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(size for key, size in sizes.items() if key in self._known)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.ops += 1
        packet = packet_of(func)
        formula = flop_registry.get(_IN_PLACE.get(packet, packet))
        if formula is not None:
            args_in_full = _with_all_heads(packet, args)
            self.flops += formula(*args_in_full, **kwargs, out_val=result)
        inputs = {
            storage_key(tensor)
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor, inputs)
        return result

    def _count(self, tensor: Tensor, inputs: set[int]) -> None:
        key = storage_key(tensor)
        if key in inputs or key in self._known or tensor.device.type in self._uncounted:
            return
        self._known.add(key)
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _with_all_heads(operation: object, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return ``args`` with as many heads in the keys and values as in the queries.

    GPU kernels accept grouped queries directly, but the FLOP formulas of torch before 2.13 do not.
    """
    first = QUERY_POSITIONS.get(operation)
    if first is None:
        return args
    query, *others = args[first : first + 3]
    if others[0].shape[1] == query.shape[1]:
        return args
    heads = query.shape[1]
    full = [torch.empty((x.shape[0], heads, *x.shape[2:]), device="meta") for x in others]
    return (*args[: first + 1], *full, *args[first + 3 :])


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
