"""Replacements for the rest of a model while one part of it is measured by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynalora_optim._base.torch_private import is_batch_norm
from dynalora_optim._base.trees import hidden_states, tensors
from dynalora_optim.switching._recompute import checkpoints_itself


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        return x.data  # not a view of x: autograd forbids in-place changes of that

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_zeros(()), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.shape = y.shape
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.new_ones(ctx.shape)


def enter(anchor: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` as the start of a graph; its gradient is freed, and ``anchor`` gets a zero."""
    return cast(Tensor, _Enter.apply(anchor, x))  # type: ignore[no-untyped-call]


def leave(y: Tensor) -> Tensor:
    """Return a scalar whose backward passes on a gradient of y's shape, without holding y."""
    return cast(Tensor, _Leave.apply(y))  # type: ignore[no-untyped-call]


def own_loss(output: Any) -> Tensor | None:
    """Return the loss that the model has computed itself; None if it has none."""
    loss = getattr(output, "loss", output)
    if isinstance(loss, Mapping):
        loss = loss.get("loss")
    if isinstance(loss, (tuple, list)) and loss:  # such as (loss, logits)
        loss = loss[0]
    is_named = loss is not output and not isinstance(output, (tuple, list))
    if isinstance(loss, Tensor) and loss.requires_grad and (is_named or loss.numel() == 1):
        return loss
    return None


def loss_of(output: Any) -> Tensor:
    """Return the model's loss; if it has none, a scalar with a gradient for every output."""
    loss = own_loss(output)
    if loss is not None:
        return loss.sum()
    outputs = [tensor for tensor in tensors(output) if tensor.requires_grad]
    return sum((leave(tensor) for tensor in outputs), torch.zeros(()))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore random numbers, running statistics and the autocast cache setting afterwards."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    statistics = [
        (buffer, buffer.clone())
        for module in model.modules()
        if is_batch_norm(module)
        for buffer in module.buffers(recurse=False)
    ]
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a cached cast has no graph: do not use it in one
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        with torch.no_grad():
            for buffer, saved in statistics:
                buffer.copy_(saved)


@contextmanager
def no_autocast() -> Iterator[None]:
    """Turn autocast off for a backward pass, which runs outside autocast in a user's loop."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def outside_checkpoint(block: nn.Module) -> AbstractContextManager[object]:
    """Return a context in which the block's own checkpoint does not handle saved tensors.

    Older releases of transformers (such as 5.17) run the hooks of a layer inside its checkpoint.
    """
    if checkpoints_itself(block):
        return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    return nullcontext()


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states that a block is called with.

    Raises:
        ValueError: No argument is a floating-point tensor.
    """
    x = hidden_states(args, kwargs)
    if x is None:
        raise ValueError(
            "Budget: a block is called without a floating-point tensor, so that it cannot be "
            "measured; use an allocator without a memory budget, such as 'discounted'."
        )
    return x
