"""peft's AdaLoRA with its own rank allocation, beside ours."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import build
from torch.optim import AdamW
from toy import same, weights

from dynalora_optim import DynamicAllocationOptimizer

peft = pytest.importorskip("peft")


def adapted():
    tiny = build("llama")
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        r=4, target_r=2, init_r=4, target_modules=["q_proj", "v_proj"],
        total_step=12, tinit=2, tfinal=2, deltaT=1,
    )  # fmt: skip
    return tiny, peft.get_peft_model(tiny.model, config)


def train(tiny, model, optimizer, steps=12):
    for step in range(steps):
        tiny.loss().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def test_all_active_is_peft_alone():
    found = []
    for wrap in (False, True):
        tiny, model = adapted()
        optimizer = AdamW(model.parameters(), lr=0.01)
        if wrap:
            optimizer = DynamicAllocationOptimizer(optimizer, model, active=1.0)
        train(tiny, model, optimizer)
        found.append((weights(model), model.peft_config["default"].rank_pattern))
    (plain, pattern), (ours, same_pattern) = found
    assert same(plain, ours)
    assert pattern == same_pattern
    assert pattern


def test_ranks_are_allocated_while_modules_are_inactive():
    tiny, model = adapted()
    optimizer = DynamicAllocationOptimizer(
        AdamW(model.parameters(), lr=0.01), model, active=1, period=3, allocator="round_robin"
    )
    allocator = model.base_model.rankallocator
    train(tiny, model, optimizer, 4)
    before = copy.deepcopy(allocator.exp_avg_ipt)
    train(tiny, model, optimizer, 1)
    idle = set(optimizer.groups) - set(optimizer.active_groups)
    for name, scores in allocator.exp_avg_ipt.items():
        place = "base_model.model." + name.rsplit(".lora_", 1)[0]
        assert scores.isfinite().all()
        if place in idle:
            assert torch.equal(scores, before[name]), "kept, not forgotten"
    train(tiny, model, optimizer)
    kept = [sum(ranks) for ranks in model.peft_config["default"].rank_pattern.values()]
    assert sum(kept) <= 2 * len(kept)
    assert all(w.isfinite().all() for w in weights(model).values())
    optimizer.close()
    assert "update_ipt" not in vars(allocator)
