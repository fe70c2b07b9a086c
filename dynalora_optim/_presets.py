"""Known ways of full-parameter training by blocks, as settings of the one optimizer.

Each function builds a `DynamicAllocationOptimizer` and sets nothing that its arguments could not.
Any of those, given by name, takes the place of a preset's own.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from dynalora_optim._optimizer import DynamicAllocationOptimizer
from dynalora_optim.allocation._allocators import RoundRobin
from dynalora_optim.groups._rules import Blocks


def lisa(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    layers: int = 2,
    period: int = 20,
    **options: Any,
) -> DynamicAllocationOptimizer:
    """Return the optimizer of LISA: embeddings and head always, and a few layers drawn at random.

    Args:
        model: A model with repeated blocks.
        optimizer: Over its parameters.
        layers: How many blocks are active at a time.
        period: Optimizer steps between draws.
        **options: Of `DynamicAllocationOptimizer`. LISA's own code keeps the moments of layers that
            pause; ``pause="drop"`` or ``"offload"`` frees their memory.

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

    Weights of lower precision train on float32 copies and end as the nearest to them.

    Args:
        model: A model with repeated blocks; what lies outside them stays as it is.
        optimizer: Over its parameters.
        period: Optimizer steps between switches.
        order: The order of the blocks; ``"random"`` draws one for every cycle. A block that ends
            one cycle and begins the next goes on, where BAdam's own code clears its moments.
        **options: Of `DynamicAllocationOptimizer`.

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
