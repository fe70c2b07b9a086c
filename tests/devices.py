"""What the tests for a GPU share; each runs on the CPU too, so that it is rehearsed everywhere."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dynalora_optim import Backward, LiveBytes

OFFLOAD: dict[str, Any] = {"pause": "offload"}
DROP: dict[str, Any] = {"pause": "drop"}
FUSED: dict[str, Any] = {"backward": Backward(fused=True)}

_ASKS_FOR_A_VALUE = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.allclose.default,
)


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


class _Values(TorchDispatchMode):
    """Counts the operations that hand a number to Python: on a GPU each would wait for it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in _ASKS_FOR_A_VALUE
        return func(*args, **(kwargs or {}))


def values_asked_for(step: Callable[[], object]) -> int:
    """Return how often a step asks for a value."""
    with _Values() as mode:
        step()
    return mode.count


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Turn every wait for the GPU into an error; nothing on a CPU."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@dataclass
class Peak:
    """The most bytes of a while above what was there: asked for, and as CUDA rounds them."""

    requested: int = 0
    allocated: int = 0


@contextmanager
def peak_above(device: str) -> Iterator[Peak]:
    """Watch the most bytes alive; on a CPU those of tensors, on a GPU those of its allocator."""
    peak = Peak()
    if device != "cuda":
        with LiveBytes() as memory:
            yield peak
        peak.requested = peak.allocated = memory.peak
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    yield peak
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    for kind in ("requested", "allocated"):
        most = after[f"{kind}_bytes.all.peak"] - before[f"{kind}_bytes.all.current"]
        setattr(peak, kind, most)


def saved_and_loaded(*parts: Any, map_location: str | None = None) -> list[Any]:
    """Return the state dicts of ``parts`` after a way through a file."""
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in parts], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True, map_location=map_location)


class WideLayer(nn.Module):
    """A residual block of wide layers, without attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Wide(nn.Module):
    """Blocks whose activations outweigh their weights, and a loss."""

    def __init__(self, width: int = 128, blocks: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.layers = nn.ModuleList(WideLayer(width) for _ in range(blocks))
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, width) to a loss."""
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).float().square().mean()
