"""Memory that a kernel allocates for itself: no tensor shows it, only the allocator.

On a GPU the backward of attention is such a kernel. It adds the gradient of the queries up in
float32, and with grouped queries it makes the gradients of keys and values for all heads at first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dynalora_optim._base.torch_private import QUERY_POSITIONS

_DEVICE = "cuda"
# How many float32 copies of the queries a kernel makes at the most. Those of flash attention and
# cuDNN are measured (`benchmarks/gpu/workspaces.py`: to 256 bytes on an H100, with torch 2.11); the
# memory-efficient kernel did not run there, and is taken to need as much as flash attention.
_COPIES = {"flash": 3, "efficient": 3, "cudnn": 2}
_KERNELS = {
    operation: kind
    for operation, position in QUERY_POSITIONS.items()
    for kind in _COPIES
    if position == 1 and kind in str(operation)
}
_ROUNDED = 256  # bytes, for small tensors


def workspace_of(packet: Any, args: tuple[Any, ...]) -> int:
    """Return the bytes that the kernel of this operation allocates for itself; mostly 0."""
    kind = _KERNELS.get(packet)
    if kind is None:
        return 0
    query = args[1]
    return workspace(kind, query) if query.device.type == _DEVICE else 0


def workspace(kind: str, query: Tensor) -> int:
    """Return the bytes for queries of (rows, heads, length, size); both last ones are rounded up.

    Beside the copies there is one float32 number per row of the scores.
    """
    rows, heads, length, size = query.shape
    length, size = -(-length // 128) * 128, -(-size // 32) * 32
    return 4 * rows * heads * length * (_COPIES[kind] * size + 1) + _ROUNDED
