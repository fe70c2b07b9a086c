"""DynaVeRA: the allocation over our VeRA layers, which really freezes them."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import TRANSFORMERS, TinyModel, build
from toy import same, weights

from dynalora_adapters import LoRAConfig, VeRAConfig, inject
from dynalora_optim import DynamicAllocationOptimizer


def adapted(kind: str, name: str = "bert") -> TinyModel:
    tiny = build(name)
    torch.manual_seed(0)
    options = {"rank": 4, "targets": tiny.targets, "trainable": tiny.trainable}
    config = VeRAConfig(**options) if kind == "VeRA" else LoRAConfig(alpha=8, **options)
    inject(tiny.model, config)
    return tiny


def optimizer_of(tiny: TinyModel, **options) -> DynamicAllocationOptimizer:
    inner = torch.optim.AdamW(tiny.model.parameters(), lr=1e-2, weight_decay=0.1)
    return DynamicAllocationOptimizer(inner, tiny.model, **options)


def train(tiny: TinyModel, optimizer: DynamicAllocationOptimizer, steps: int) -> None:
    for _ in range(steps):
        tiny.loss().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["LoRA", "VeRA"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_only_active_layers_and_the_head_move(kind: str, name: str) -> None:
    # The published DynaVeRA trains all of them: its filter knows LoRA's parameter names only.
    tiny = adapted(kind, name)
    optimizer = optimizer_of(tiny, active=1, period=1, allocator="round_robin")
    for _ in range(len(optimizer.groups)):
        before, (active,) = weights(tiny.model), optimizer.active_groups
        train(tiny, optimizer, 1)
        after = weights(tiny.model)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        adapters = {name for name in moved if "lora_" in name or "vera_" in name}
        assert adapters
        assert all(name.startswith(f"{active}.") for name in adapters)
        assert moved - adapters, "the head is always active"


def test_the_shared_projections_belong_to_no_group() -> None:
    tiny = adapted("VeRA")
    optimizer = optimizer_of(tiny)
    names = [name for group in optimizer.module_groups for name in group["param_names"]]
    assert not any("projection" in name for name in names)
    assert len(optimizer.groups) == 4, "layers that share A and B are groups of their own"


@pytest.mark.parametrize("importance", ["forward", "gradient", "sensitivity"])
def test_a_dynavera_run_resumes_bit_for_bit(importance: str) -> None:
    straight = adapted("VeRA")
    reference = optimizer_of(straight, active=2, period=2, importance=importance)
    train(straight, reference, 3)
    saved = copy.deepcopy((straight.model.state_dict(), reference.state_dict()))
    train(straight, reference, 4)
    resumed = adapted("VeRA")
    optimizer = optimizer_of(resumed, active=2, period=2, importance=importance)
    resumed.model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(resumed, optimizer, 4)
    assert same(weights(resumed.model), weights(straight.model))
    assert optimizer.record.state_dict() == reference.record.state_dict()
