"""The rows of `memory.py` for language models with a real vocabulary: the loss in chunks."""

from __future__ import annotations

from functools import cache, partial

from _count import count
from _rows import (
    ALL_ACTIVE,
    CHECKPOINTED,
    PEER_FRONT,
    REFERENCE,
    Build,
    all_active,
    budget_name,
    budgeted,
    pefts,
    plain_rows,
)
from _runs import Run
from _shapes import Shape
from _torch_loss import TorchChunkedRun, is_there
from torch import nn

from dynalora_optim.integrations.transformers import chunk_loss

IN_CHUNKS = ", chunked loss"
CHUNKED_FRONT = {f"{name}{IN_CHUNKS}": every for name, every in PEER_FRONT.items()}


def chunked_name(memory: float, compute: float) -> str:
    return f"{budget_name(memory, compute)}{IN_CHUNKS}"


def rows(shape: Shape) -> dict[str, Build]:
    """Return the rows of a shape, by name."""
    return chunked_rows(shape) if shape.chunk else plain_rows(shape)


def chunked_rows(shape: Shape) -> dict[str, Build]:
    """Return the rows of a shape whose budgets are shares of the peak of `REFERENCE`."""
    budgets = {
        chunked_name(memory, compute): partial(of_pefts_peak, memory=memory, compute=compute)
        for memory, compute in shape.budgets
    }
    return {
        REFERENCE: pefts,
        CHECKPOINTED: partial(pefts, every=1),
        **{name: partial(torch_chunked, every=every) for name, every in CHUNKED_FRONT.items()},
        ALL_ACTIVE: all_active,
        f"{ALL_ACTIVE}{IN_CHUNKS}": all_active_chunked,
        **budgets,
    }


def torch_chunked(shape: Shape, bare: nn.Module, *, every: int = 0) -> Run:
    """Train with peft and torch's own loss in chunks; checkpoint every n-th block."""
    if not is_there():
        raise ValueError("torch has its own linear_cross_entropy from 2.13 on")
    run = pefts(shape, bare, every=every)
    return TorchChunkedRun(run.model, run.optimizer, run.batch, chunk=shape.chunk)


def all_active_chunked(shape: Shape, bare: nn.Module) -> Run:
    """Train with all modules active, and our loss in chunks."""
    return in_chunks(all_active(shape, bare), shape.chunk)


def of_pefts_peak(
    shape: Shape,
    bare: nn.Module,
    *,
    memory: float,
    compute: float | None,
    base: str = "discounted",
) -> Run:
    """Train with a budget of ``memory`` times peft's peak, in bytes, and the shape's loss."""
    limit = int(memory * _counted_once(shape, bare))
    run = budgeted(shape, bare, memory=limit, compute=compute, base=base)
    return in_chunks(run, shape.chunk) if shape.chunk else run


def reference_peak(shape: Shape, bare: nn.Module) -> int:
    """Count the peak of the reference row."""
    return count(pefts(shape, bare).loss).peak


_counted_once = cache(reference_peak)


def in_chunks(run: Run, chunk: int) -> Run:
    """Let the model of a run compute its loss in chunks, and return the run."""
    chunk_loss(run.model, chunk=chunk)
    return run
