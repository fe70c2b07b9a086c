"""Count peak bytes, saved bytes, FLOPs and operations of one forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dynalora_optim import LiveBytes


@dataclass(frozen=True)
class Counted:
    """The counts of a forward and backward pass, without what existed before it.

    Attributes:
        peak: The largest number of bytes of tensor storage alive at the same time.
        saved: The bytes that the forward pass leaves alive: what autograd keeps.
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


def count(loss: Callable[[], Tensor]) -> Counted:
    """Run ``loss()`` and its backward pass, and count. The gradients are kept."""
    before = _restart_allocated()
    with LiveBytes() as memory:
        value = loss()
        forward, ops, peak = memory.flops, memory.ops, memory.peak
        saved = memory.live - memory.size([value])
        memory.restart()
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]
        return Counted(
            peak=max(peak, memory.peak),
            saved=saved,
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
