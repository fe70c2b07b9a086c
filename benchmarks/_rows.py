"""The rows of `memory.py`: ways to train, each with its model and optimizer."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from _count import count
from _runs import Run, Watched
from _shapes import Shape, copy_sharing
from torch import nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import DynamicAllocationOptimizer

FULL = "full fine-tuning"
REFERENCE = "peft LoRA"
ALL_ACTIVE = "ours, all active"
UNWRAPPED = "our LoRA, plain AdamW"
CHECKPOINTED = "peft, every block checkpointed"
RANDOM = "peft, random 2/3 of the modules"
PEER_FRONT = {  # the number of blocks of which one is checkpointed
    REFERENCE: 0,
    "peft, every 4th block checkpointed": 4,
    "peft, every 2nd block checkpointed": 2,
    CHECKPOINTED: 1,
}


def _adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def _blocks(model: nn.Module) -> nn.ModuleList:
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return max(lists, key=len)


def full(shape: Shape, bare: nn.Module) -> Run:
    model = shape.bare()  # a model of its own, because its weights change
    return Run(model, _adamw(model), shape.batch(model))


def peft_model(shape: Shape, bare: nn.Module, *, every: int = 0) -> nn.Module:
    """Add peft's LoRA to a copy of ``bare``, and checkpoint every n-th block, if ``every`` is n.

    The checkpoints are non-reentrant, and inputs require no gradients. With transformers' own
    switch the inputs would require gradients, and the backward pass would go through the whole
    lowest block, without any use.
    """
    model: Any = copy_sharing(bare, shape.head)
    config = peft.LoraConfig(
        r=shape.rank,
        lora_alpha=2 * shape.rank,
        target_modules=shape.targets,
        modules_to_save=[shape.head] if shape.head else None,
    )
    adapted: nn.Module = peft.get_peft_model(model, config).train()
    for position, block in enumerate(_blocks(adapted)):
        if every and position % every == 0:
            block.gradient_checkpointing = True  # type: ignore[assignment]
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
    return adapted


def pefts(shape: Shape, bare: nn.Module, *, every: int = 0) -> Run:
    model = peft_model(shape, bare, every=every)
    return Run(model, _adamw(model), shape.batch(bare))


def random_pefts(shape: Shape, bare: nn.Module) -> Run:
    """Freeze a random third of peft's modules, drawn again after each step, as in the paper."""
    run = pefts(shape, bare)
    layers = [m for m in run.model.modules() if len(getattr(m, "lora_A", ()))]
    generator = random.Random(0)

    def redraw() -> None:
        active = set(generator.sample(range(len(layers)), round(len(layers) * 2 / 3)))
        for position, layer in enumerate(layers):
            for part in (layer.lora_A, layer.lora_B):
                part.requires_grad_(position in active)

    redraw()
    run.redraw, run.draws = redraw, shape.control_draws
    return run


def injected(shape: Shape, bare: nn.Module) -> nn.Module:
    """Add our LoRA to a copy of ``bare``."""
    config = LoRAConfig(
        rank=shape.rank,
        alpha=2 * shape.rank,
        targets=shape.targets,
        trainable=[shape.head] if shape.head else [],
    )
    return inject(copy_sharing(bare, shape.head), config).train()


def unwrapped(shape: Shape, bare: nn.Module) -> Run:
    """Train our adapters without the wrapper, to see what the wrapper and its measure add."""
    model = injected(shape, bare)
    return Run(model, _adamw(model), shape.batch(bare))


def all_active(shape: Shape, bare: nn.Module) -> Run:
    model = injected(shape, bare)
    optimizer = DynamicAllocationOptimizer(_adamw(model), model, active=1.0)
    return Run(model, optimizer, shape.batch(bare))


def budgeted(
    shape: Shape,
    bare: nn.Module,
    *,
    memory: float,
    compute: float | None,
    base: str = "discounted",
) -> Run:
    """Train with a budget, with a new choice after each step."""
    model = injected(shape, bare)
    budget = Watched(memory=memory, compute=compute, base=base)
    optimizer = DynamicAllocationOptimizer(_adamw(model), model, allocator=budget, period=1)
    # A bound on the mean compute needs more draws: 40 in place of 24.
    draws = shape.draws if compute == 1 else round(shape.draws * 5 / 3)
    return Run(model, optimizer, shape.batch(bare), draws=draws, budget=budget)


def budget_name(memory: float, compute: float) -> str:
    return f"ours, Budget({memory:g}, {compute:g})"


Build = Callable[[Shape, nn.Module], Run]

PEERS: dict[str, Build] = {
    FULL: full,
    REFERENCE: pefts,
    RANDOM: random_pefts,
    **{name: partial(pefts, every=every) for name, every in PEER_FRONT.items() if every},
}


def plain_rows(shape: Shape) -> dict[str, Build]:
    """Return the rows of a shape, by name. On a GPU, full fine-tuning does not fit."""
    budgets = {
        budget_name(memory, compute): partial(budgeted, memory=memory, compute=compute)
        for memory, compute in shape.budgets
    }
    peers = {name: row for name, row in PEERS.items() if name != FULL or shape.device == "cpu"}
    return {**peers, UNWRAPPED: unwrapped, ALL_ACTIVE: all_active, **budgets}


def ops_without_adapters(shape: Shape, bare: nn.Module) -> int:
    """Count the operations of a step of the frozen model, with a gradient through all blocks.

    The adapters need this backward pass, but it is not counted as an operation that they add.
    """
    model: Any = copy_sharing(bare, shape.head).requires_grad_(False)
    if shape.head:
        model.get_submodule(shape.head).requires_grad_(True)
    model.enable_input_require_grads()
    batch = shape.batch(bare)
    return count(lambda: model(**batch).loss).ops
