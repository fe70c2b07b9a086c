"""A budget holds under autocast, wherever it begins and ends, also where whole blocks train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budgets import clear, gradients
from test_budget_loops import WIDE, rows
from tiny_models import TinyModel, build
from torch import Tensor

from dynalora_optim import Blocks, Budget, DynamicAllocationOptimizer, LiveBytes

WHERE = ("outside", "inside", "whole step")
STEPS = 12


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def model(name: str, where: str) -> TinyModel:
    tiny = build(name, 0, WIDE)
    tiny.model.train()
    if where == "inside":  # as Accelerate does
        tiny.model.forward = autocast()(tiny.model.forward)
    return tiny


def train(tiny: TinyModel, where: str, shape: tuple[int, int], seed: int) -> int:
    """Run a forward and its backward, and return the peak."""
    batch = rows(tiny, *shape, seed)
    with LiveBytes() as memory:
        if where == "inside":
            tiny.model(**batch).loss.backward()
        else:
            with autocast():
                loss: Tensor = tiny.model(**batch).loss
                assert torch.is_autocast_cache_enabled()
                if where == "whole step":
                    loss.backward()
            if where == "outside":
                loss.backward()
        del batch
    return memory.peak


def on_blocks(tiny: TinyModel, limit: int) -> Any:
    return DynamicAllocationOptimizer(
        torch.optim.SGD(tiny.model.parameters(), lr=0.0),
        tiny.model,
        groups=Blocks(outside="frozen"),
        allocator=Budget(memory=limit, base="random"),
        period=1,
    )


@pytest.mark.parametrize("shape", [(2, 8), (8, 32)], ids=str)  # the first holds mostly weights
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_no_step_exceeds_the_budget_nor_changes_a_gradient(name, where, shape):
    unshaped, tiny = model(name, where), model(name, where)
    whole = train(unshaped, where, shape, 0)
    limit = round(0.65 * whole)
    optimizer = on_blocks(tiny, limit)
    for step in range(STEPS):
        clear(unshaped)
        clear(tiny)
        train(unshaped, where, shape, step)
        assert train(tiny, where, shape, step) <= limit, step
        want, found = gradients(unshaped), gradients(tiny)
        assert found
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, want[key], rtol=1e-5, atol=1e-6)
        optimizer.step()
    assert len({entry.chosen for entry in optimizer.record}) > 1
    assert torch.is_autocast_cache_enabled()


def test_the_users_own_setting_of_the_cache_stays():
    tiny = model("bert", "outside")
    optimizer = on_blocks(tiny, 10_000_000)
    batch = rows(tiny, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        tiny.model(**batch).loss.backward()
        assert not torch.is_autocast_cache_enabled()
    with autocast():
        with pytest.raises((TypeError, ValueError)):
            tiny.model(nothing=batch)
        tiny.model(**batch).loss.backward()
        assert torch.is_autocast_cache_enabled()
    optimizer.close()
    seen = []
    tiny.model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_cache_enabled()))
    with autocast():
        tiny.model(**batch)
    assert seen == [True]
    assert torch.is_autocast_cache_enabled()
