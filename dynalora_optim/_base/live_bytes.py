"""Counting what a computation holds: the bytes of live tensors, their peak, and FLOPs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from dynalora_optim._base.torch_private import (
    QUERY_POSITIONS,
    TorchDispatchMode,
    held_locally,
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
    ``torch.cuda.max_memory_allocated`` reports. Tensors that existed before are not counted. A
    storage that is resized, as FSDP2 resizes those of gathered parameters, counts with its new
    size from then on.

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
        self.pauses = 0  # while it is not 0, nothing is counted
        self._known: dict[int, int] = {}  # the bytes of each counted storage
        self.restart()

    def __enter__(self) -> LiveBytes:
        _listen(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _stop_listening(self)
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

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
        if self.pauses:
            return result
        self.ops += 1
        packet = packet_of(func)
        formula = flop_registry.get(_IN_PLACE.get(packet, packet))
        if formula is not None:
            args_in_full = _with_all_heads(packet, args)
            self.flops += formula(*args_in_full, **kwargs, out_val=result)
        inputs = {
            storage_key(held_locally(tensor))
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor, inputs)
        return result

    def _count(self, tensor: Tensor, inputs: set[int]) -> None:
        tensor = held_locally(tensor)
        key = storage_key(tensor)
        if key in inputs or key in self._known or tensor.device.type in self._uncounted:
            return
        self._add(key, tensor.untyped_storage())

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        self._known[key] = 0
        self._change(key, storage.nbytes())
        weakref.finalize(storage, self._free, key).atexit = False

    def _change(self, key: int, size: int) -> None:
        self.live += size - self._known[key]
        self._known[key] = size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)

    def resized(self, storage: torch.UntypedStorage, before: int) -> None:
        """Count the new size of a storage; one that is not counted so far has grown, or is not."""
        key = storage_key(storage)
        if key in self._known:
            self._change(key, storage.nbytes())
        elif storage.nbytes() > before and storage.device.type not in self._uncounted:
            self._add(key, storage)


_listeners: list[LiveBytes] = []


def _listen(counter: LiveBytes) -> None:
    """Tell ``counter`` of each storage that is resized; no operation is dispatched for that."""
    if not _listeners:
        torch.UntypedStorage.resize_ = _resize  # type: ignore[assignment,method-assign]
    _listeners.append(counter)


def _stop_listening(counter: LiveBytes) -> None:
    _listeners.remove(counter)
    if not _listeners:
        del torch.UntypedStorage.resize_


@contextmanager
def uncounted() -> Iterator[None]:
    """Enter a context whose tensors take no memory: counters from before do not count them."""
    counters = list(_listeners)
    for counter in counters:
        counter.pauses += 1
    try:
        yield
    finally:
        for counter in counters:
            counter.pauses -= 1


def _resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
    before = storage.nbytes()
    super(torch.UntypedStorage, storage).resize_(size)
    for counter in _listeners:
        counter.resized(storage, before)
    return storage


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
    """Return the bytes of a tensor's elements; of a DTensor, of those that this rank holds."""
    tensor = held_locally(tensor)
    return tensor.numel() * tensor.element_size()


def storage_bytes(found: Iterable[Tensor], unit: int = 1) -> int:
    """Return the bytes of the storages of these tensors, each once, in multiples of ``unit``."""
    parts = [part for tensor in found for part in flattened(tensor)]
    sizes = {storage_key(part): part.untyped_storage().nbytes() for part in parts}
    return sum(-(-size // unit) * unit for size in sizes.values())


def flattened(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor of a class of its own is made of, or ``tensor``."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from flattened(getattr(tensor, name))
    else:
        yield tensor
