"""The rows of `full_parameter.py`: ways to train, each with a function that builds an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from _badam import block_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from dynalora_optim import AllocationContext, Backward, badam, lisa

ADAMW = "AdamW"
PACKAGE = "badam package"
PACKAGE_CHECKPOINTED = "badam package, every block checkpointed"
OURS = "ours, badam (drop)"
OFFLOAD = "ours, badam, offload"
KEEP = "ours, badam, keep"
FUSED = "ours, badam, fused_backward"
IDLE = "ours, badam, checkpoint_idle"
CHECKPOINTED = "ours, badam, every block checkpointed"
LISA_DROP = "ours, LISA, drop"
LISA_KEEP = "ours, LISA, keep"
LORA = "peft LoRA"
LISA_LAYERS = 2
STEPS_EACH = 2  # at each position; the first creates the optimizer state


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)


def blocks(model: nn.Module) -> nn.ModuleList:
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return max(lists, key=len)


@dataclass(frozen=True)
class Listed:
    """An allocator that activates the blocks of a list, one after the other."""

    positions: tuple[int, ...]

    def select(self, context: AllocationContext) -> list[int]:
        return [self.positions[context.reallocation % len(self.positions)]]


class Package:
    """The optimizer of the badam package, with its state in the attribute that torch uses."""

    def __init__(self, model: nn.Module, position: int) -> None:
        self.inner = block_optimizer(
            adamw(model), model, switch_block_every=10**9, switch_mode="fixed", start_block=position
        )
        self.step, self.zero_grad = self.inner.step, self.inner.zero_grad

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        state = self.inner.base_optimizer.state
        copies = self.inner.param_idx2hp.values()
        return {copy: {**state.get(copy, {}), "master_weight": copy} for copy in copies}


@dataclass(frozen=True)
class Row:
    """A way of training.

    Attributes:
        optimizers: Takes a model and the positions to visit. Yields each position, and the
            optimizer that trains it for the next `STEPS_EACH` steps. The position is None if the
            row has no positions.
        active: Number of blocks that train at a time; None if all blocks train, or only adapters.
        has_outside: Whether parameters outside the blocks train too.
        prepare: A function that changes the model first.
    """

    optimizers: Callable[[nn.Module, tuple[int, ...]], Iterator[tuple[int | None, Any]]]
    active: int | None = None
    has_outside: bool = False
    prepare: Callable[[nn.Module], nn.Module] = field(default=lambda model: model)


def _plain(model: nn.Module, positions: tuple[int, ...]) -> Iterator[tuple[None, Optimizer]]:
    yield None, adamw(model)


def _package(model: nn.Module, positions: tuple[int, ...]) -> Iterator[tuple[int, Package]]:
    for position in positions:
        yield position, Package(model, position)
    model.requires_grad_(True)


def _badam(
    model: nn.Module, positions: tuple[int, ...], **options: Any
) -> Iterator[tuple[int, Optimizer]]:
    allocator = Listed(positions)
    optimizer = badam(model, adamw(model), allocator=allocator, period=STEPS_EACH, **options)
    for position in positions:
        yield position, optimizer
    optimizer.close()


def _lisa(
    model: nn.Module, positions: tuple[int, ...], **options: Any
) -> Iterator[tuple[None, Optimizer]]:
    optimizer = lisa(model, adamw(model), layers=LISA_LAYERS, period=STEPS_EACH, **options)
    for _ in positions:
        yield None, optimizer
    optimizer.close()


def with_lora(model: nn.Module) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def checkpointed(model: nn.Module) -> nn.Module:
    """Checkpoint every block (non-reentrant), as ``gradient_checkpointing_enable`` does."""
    for block in blocks(model):
        block.gradient_checkpointing = True  # type: ignore[assignment]
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
    return model


ROWS = {
    ADAMW: Row(_plain),
    LISA_KEEP: Row(partial(_lisa, pause="keep"), active=LISA_LAYERS, has_outside=True),
    LISA_DROP: Row(partial(_lisa, pause="drop"), active=LISA_LAYERS, has_outside=True),
    PACKAGE: Row(_package, active=1),
    OURS: Row(_badam, active=1),
    KEEP: Row(partial(_badam, pause="keep"), active=1),
    OFFLOAD: Row(partial(_badam, pause="offload"), active=1),
    FUSED: Row(partial(_badam, backward=Backward(fused=True)), active=1),
    IDLE: Row(partial(_badam, backward=Backward(checkpoint_idle=True)), active=1),
    PACKAGE_CHECKPOINTED: Row(_package, active=1, prepare=checkpointed),
    CHECKPOINTED: Row(_badam, active=1, prepare=checkpointed),
    LORA: Row(_plain, prepare=with_lora),
}


def active_state(optimizer: Any) -> int:
    """Return the bytes of the active groups' state. On a GPU, "offload" keeps no other there."""
    active = getattr(optimizer, "active_parameters", optimizer.state.keys)()
    return sum(_state_bytes(optimizer.state.get(parameter, {})) for parameter in active)


def _state_bytes(values: dict[str, Any]) -> int:
    tensors = [v for k, v in values.items() if isinstance(v, Tensor) and k != "master_weight"]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
