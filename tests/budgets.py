"""Tiny adapted models on a budget: what the tests of the memory half build and measure."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Any

import torch
from tiny_models import ROOMY, Sizes, TinyModel, build, randomize_trainable
from torch import Tensor
from torch.torch_version import TorchVersion

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import Budget, DynamicAllocationOptimizer, LiveBytes
from dynalora_optim._base.packages import installed
from dynalora_optim.allocation._costs import Costs, Plan

TRANSFORMERS = TorchVersion(installed("transformers").replace("not installed", "0"))
MODELS = ("bert", "roberta", "mpnet", "gpt2", "llama", "vit", "encoder")
ALL_LINEAR = {  # every linear layer of a block, grouped-query projections among them
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
}


def adapted(
    name: str, how: str = "ours", *, sizes: Sizes = ROOMY, head: bool = True, seed: int = 0
) -> TinyModel:
    """A tiny model with rank-4 LoRA, ours or peft's, that has been trained a little."""
    tiny = build(name, seed, sizes)
    targets = ALL_LINEAR.get(name, tiny.targets)
    trainable = tiny.trainable if head else []
    if how == "ours":
        inject(tiny.model, LoRAConfig(rank=4, alpha=8, targets=targets, trainable=trainable))
    else:
        import peft

        config = peft.LoraConfig(
            r=4, target_modules=targets, fan_in_fan_out=name == "gpt2", modules_to_save=trainable
        )
        tiny.model = peft.get_peft_model(tiny.model, config)
    randomize_trainable(tiny.model)
    tiny.model.train()
    return tiny


def on_budget(tiny: TinyModel, budget: Budget | None = None, **options: Any) -> Any:
    """An optimizer with a budget, by default one that all modules fit."""
    rule = options.pop("rule", torch.optim.SGD)
    inner = rule(tiny.model.parameters(), lr=options.pop("lr", 0.01))
    allocator = budget or Budget(memory=1.0)
    return DynamicAllocationOptimizer(inner, tiny.model, allocator=allocator, **options)


def costs_of(optimizer: DynamicAllocationOptimizer) -> Costs:
    """What the first training forward measured, for a forward and backward alone."""
    costs = optimizer._allocation.costs
    assert costs is not None
    return costs.in_no_loop()


def shape(optimizer: DynamicAllocationOptimizer, plan: Plan) -> None:
    """Put a plan of the test's own choice into force, for all forwards from now on."""
    optimizer._costing.close()
    driver, costs = optimizer._driver, costs_of(optimizer)
    groups = list(driver._groups.values())
    chosen = {
        group.name
        for group, block in zip(groups, costs.group_blocks, strict=True)
        if block is None or block in plan.active
    }
    driver.switch.set_flags(groups, chosen)
    driver.switch.recompute(costs.in_model(plan.checkpointed))


def some_plans(costs: Costs, count: int, seed: int = 0) -> list[Plan]:
    """All active, then random sets of blocks, every other one with checkpoints."""
    blocks, generator = range(len(costs.blocks)), random.Random(seed)
    plans = [costs.all_active]
    for position in range(count - 1):
        active = costs.pinned | set(generator.sample(blocks, generator.randint(1, len(blocks))))
        active |= {0} if costs.prefix else set()
        above = [b for b in blocks[min(active) :] if position % 2 and generator.random() < 0.6]
        plans.append(Plan(frozenset(active), frozenset(above)))
    return plans


def clear(tiny: TinyModel) -> None:
    """Drop all gradients."""
    tiny.model.zero_grad(set_to_none=True)


def measured(loss: Callable[[], Tensor]) -> tuple[int, int]:
    """The peak of a real forward and backward pass, and the FLOPs of the backward."""
    with LiveBytes() as memory:
        value = loss()
        forward = memory.flops
        value.backward()
        del value
    return memory.peak, memory.flops - forward


def gradients(tiny: TinyModel) -> dict[str, Tensor]:
    """All gradients that there are, by the parameter's name."""
    named = tiny.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def in_blocks(names: Collection[str], optimizer: DynamicAllocationOptimizer) -> set[int]:
    """The positions of the blocks that hold these groups."""
    costs = costs_of(optimizer)
    return set(costs.blocks_of([optimizer.groups.index(name) for name in names]))


def check_runs(tiny: TinyModel, budget: Budget, steps: int = 8) -> None:
    """No step of a run with this budget, in bytes, exceeds it; several choices are made."""
    optimizer = on_budget(tiny, budget, period=1)
    for _ in range(steps):
        clear(tiny)
        peak, _ = measured(tiny.loss)
        assert peak <= budget.memory
        optimizer.step()
    assert len({entry.chosen for entry in optimizer.record}) > 1
