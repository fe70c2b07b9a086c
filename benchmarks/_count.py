"""Count peak bytes, saved bytes, FLOPs and operations of one forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dynalora_optim import LiveBytes


@dataclass(frozen=True)
class Counted:
    """The counts of a forward and backward pass, without what existed before it.

    Attributes:
        peak: The largest number of bytes of tensor storage alive at the same time.
        saved: The bytes that autograd keeps at the end of the forward pass, without parameters.
        forward: FLOPs of the forward pass.
        backward: FLOPs of the backward pass, including recomputation.
        ops: Number of dispatched operations.
        allocated: The peak that CUDA's caching allocator reports; 0 on a CPU.
    """

    peak: int
    saved: int
    forward: int
    backward: int
    ops: int
    allocated: int = 0


class SavedBytes:
    """Counts the bytes that autograd keeps. Each storage counts once; parameters do not count."""

    def __init__(self, model: nn.Module) -> None:
        self._left_out = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._storages: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self._storages.values())

    def counting(self) -> AbstractContextManager[None]:
        return saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._left_out:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def count(loss: Callable[[], Tensor], model: nn.Module) -> Counted:
    """Run ``loss()`` and its backward pass, and count. The gradients are kept."""
    saved = SavedBytes(model)
    before = _restart_allocated()
    with LiveBytes() as memory:
        with saved.counting():
            value = loss()
        forward, ops, peak = memory.flops, memory.ops, memory.peak
        memory.restart()
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]
        return Counted(
            peak=max(peak, memory.peak),
            saved=saved.total,
            forward=forward,
            backward=memory.flops,
            ops=ops + memory.ops,
            allocated=_peak_allocated() - before,
        )


def _restart_allocated() -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_allocated() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
