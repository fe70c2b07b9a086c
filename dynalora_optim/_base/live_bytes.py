"""Counting what a computation holds: the bytes of live tensors, their peak, and FLOPs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
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
)
from dynalora_optim._base.workspaces import workspace_of

aten = torch.ops.aten
# Products of matrices, whose operations are known from the shapes alone. torch's registry has no
# entry for those that are added in place, although they compute as much.
_PRODUCTS: dict[Any, Any] = {
    **{product: product for product in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)},
    aten.addmm_: aten.addmm,
    aten.baddbmm_: aten.baddbmm,
}


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which every tensor storage that is created is counted until it is freed.

    It works the same way on every device and is exact to the byte: it does not include the rounding
    and the cache of a memory allocator. Its peak corresponds to the one that
    ``torch.cuda.max_memory_allocated`` reports. Tensors that existed before are not counted. A
    storage that is resized, as FSDP2 resizes those of gathered parameters, counts with its new
    size from then on. What the backward of attention allocates for itself on a GPU counts as well.

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
        self._watched: dict[int, object] = {}  # for each of them: what notes that it is freed
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
        result = func(*args, **kwargs) if kwargs else func(*args)
        if self.pauses:
            return result
        self.ops += 1
        packet = packet_of(func)
        formula = flop_registry.get(_PRODUCTS.get(packet, packet))
        if formula is not None:
            self.flops += _flops_of(packet, formula, args, kwargs or {}, result)
        self._count(_tensors(result), args, kwargs)
        if hidden := workspace_of(packet, args):
            self.peak = max(self.peak, self.live + hidden)
        return result

    def _count(self, results: list[Tensor], args: Any, kwargs: Any) -> None:
        before: set[int] | None = None  # made once: an operation may have lists of all parameters
        for tensor in map(held_locally, results):
            key = storage_key(tensor)
            if key in self._known or tensor.device.type in self._uncounted:
                continue
            # What was there before is no new storage: a view of it, or an argument itself.
            if before is None:
                inputs = _tensors((args, kwargs) if kwargs else args)
                before = {storage_key(held_locally(given)) for given in inputs}
            if key not in before:
                self._add(key, tensor.untyped_storage())

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        self._known[key] = 0
        self._watched[key] = weakref.ref(storage, partial(self._free, key))
        self._change(key, storage.nbytes())

    def _change(self, key: int, size: int) -> None:
        self.live += size - self._known[key]
        self._known[key] = size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, _: object) -> None:
        self.live -= self._known.pop(key, 0)
        self._watched.pop(key, None)

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


def _tensors(tree: Any) -> list[Tensor]:
    """Return the tensors among the arguments or results of an operation.

    Operations have no other containers than these, and this is called for each of them: `trees`
    looks into more, and takes longer.
    """
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if not isinstance(tree, (tuple, list)):
        return []
    found = []
    for item in tree:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list, dict)):
            found += _tensors(item)
    return found


def _flops_of(packet: Any, formula: Any, args: Any, kwargs: Any, result: Any) -> int:
    if packet in _PRODUCTS:
        return _product_flops(packet, *(tuple(x.shape) for x in args if isinstance(x, Tensor)))
    return int(formula(*_with_all_heads(packet, args), **kwargs, out_val=result))


@lru_cache(maxsize=4096)
def _product_flops(packet: Any, *shapes: tuple[int, ...]) -> int:
    return int(flop_registry[_PRODUCTS[packet]](*shapes))


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
        for part in (getattr(tensor, name) for name in names):
            if isinstance(part, Tensor):  # DTensor names its device mesh too
                yield from flattened(part)
    else:
        yield tensor
