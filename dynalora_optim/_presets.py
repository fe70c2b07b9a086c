"""Methods of full-parameter training by blocks, as settings of the optimizer: two are published.

Each function builds a `DynamicAllocationOptimizer`, and only sets some of its arguments. Any
argument that you pass by name replaces the preset's value.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from dynalora_optim._optimizer import DynamicAllocationOptimizer
from dynalora_optim.allocation._allocators import RoundRobin
from dynalora_optim.allocation._budget import Budget
from dynalora_optim.groups._rules import Blocks


def lisa(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    layers: int = 2,
    period: int = 20,
    **options: Any,
) -> DynamicAllocationOptimizer:
    """Return the optimizer of LISA: it always trains embeddings and head, and a few random layers.

    Args:
        model: A model with repeated blocks.
        optimizer: An optimizer over the model's parameters.
        layers: How many blocks are active at a time.
        period: Optimizer steps between draws.
        **options: Other arguments of `DynamicAllocationOptimizer`. LISA's own code keeps the
            moments of layers that pause; ``pause="drop"`` or ``"offload"`` frees their memory.

    Source: "LISA: Layerwise Importance Sampling" (arXiv 2403.17919), algorithm 1.
    """
    preset = {
        "groups": Blocks(outside="always_active"),
        "active": layers,
        "period": period,
        "allocator": "random",
    }
    return DynamicAllocationOptimizer(optimizer, model, **{**preset, **options})


def badam(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    period: int = 50,
    order: Literal["ascending", "descending", "random"] = "descending",
    **options: Any,
) -> DynamicAllocationOptimizer:
    """Return the optimizer of BAdam: one block at a time, in turn, each time with new moments.

    Low-precision weights are trained with float32 copies, and rounded to the nearest value.

    Args:
        model: A model with repeated blocks; parameters outside the blocks do not change.
        optimizer: An optimizer over the model's parameters.
        period: Optimizer steps between switches.
        order: The order of the blocks; ``"random"`` draws a new order for every cycle. If a block
            is the last of one cycle and the first of the next, it keeps its moments; BAdam's own
            code deletes them.
        **options: Other arguments of `DynamicAllocationOptimizer`.

    Source: "BAdam: A Memory Efficient Full Parameter Optimization Method" (arXiv 2404.02827),
    algorithm 1.
    """
    preset = {
        "groups": Blocks(outside="frozen"),
        "active": 1,
        "period": period,
        "allocator": RoundRobin(order, seed=options.get("seed", 0)),
        "pause": "drop",
        "master_weights": "nearest",
    }
    return DynamicAllocationOptimizer(optimizer, model, **{**preset, **options})


def blocks_on_budget(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    total: int | str | None = None,
    memory: float | str | None = None,
    compute: float | None = 0.6,
    period: int = 20,
    **options: Any,
) -> DynamicAllocationOptimizer:
    """Return an optimizer of all blocks' own weights that trains as many at a time as fit.

    Low-precision weights are trained with float32 copies, and rounded to the nearest value.

    Args:
        model: A model with repeated blocks; parameters outside the blocks do not change, except
            those of modules in ``always_active``, such as a new head.
        optimizer: An optimizer over the model's parameters.
        total: The most bytes of everything that the device holds for training: weights, optimizer
            state, gradients, activations; an int, a text (``"24GiB"``), or ``"device"``.
        memory: In place of ``total``: the most bytes alive in forward and backward, gradients
            included; as an amount, or as a share of what all blocks together take.
        compute: The share of the backward pass of all blocks that the mean step may take; None for
            any.
        period: Optimizer steps between draws.
        **options: Other arguments of `DynamicAllocationOptimizer`. The state of a block that pauses
            is dropped; with ``pause="offload"`` a GPU keeps it in host memory.

    Raises:
        ValueError: Both or none of ``total`` and ``memory`` are given, or one is out of range.
    """
    preset = {
        "groups": Blocks(outside="frozen"),
        "allocator": Budget(memory=memory, total=total, compute=compute),
        "period": period,
        "pause": "drop",
        "master_weights": "nearest",
    }
    return DynamicAllocationOptimizer(optimizer, model, **{**preset, **options})
