"""The smallest adapted model: what the optimizer's tests need of one, and nothing more."""

from __future__ import annotations

import gc
import re
from typing import Any

import torch
from torch import Tensor, nn

from dynalora_optim import DynamicAllocationOptimizer
from dynalora_optim.allocation._context import uses_active


class ToyAdapter(nn.Module):
    """A frozen linear layer with a rank-2 adapter, recognised by the AdapterModule protocol."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.base = nn.Linear(features, features).requires_grad_(False)
        self.A = nn.Parameter(torch.randn(2, features) * 0.3)
        self.B = nn.Parameter(torch.randn(features, 2) * 0.3)
        self.active = True

    def adapter_params(self) -> list[str]:
        return ["A", "B"]

    def forward(self, x: Tensor) -> Tensor:
        A, B = (self.A, self.B) if self.active else (self.A.detach(), self.B.detach())
        return self.base(x) + x @ A.T @ B.T


class ToyModel(nn.Module):
    """``layers`` blocks of one adapter, then a trainable head."""

    def __init__(self, layers: int = 6, features: int = 8, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(
            nn.Sequential(ToyAdapter(features), nn.Tanh()) for _ in range(layers)
        )
        self.head = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def names(layers: int = 6) -> list[str]:
    """The module groups of a ToyModel."""
    return [f"layers.{i}.0" for i in range(layers)]


def named(refusal: BaseException) -> int:
    """The total that a refusal names."""
    return int(re.search(r"total=(\d+) \(", str(refusal))[1])


def batch(step: int = 0, rows: int = 4, features: int = 8) -> Tensor:
    """The input of one step, the same in every run."""
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(1000 + step))


def backward(model: nn.Module, step: int = 0) -> Tensor:
    """One forward and backward pass; returns the loss."""
    loss = model(batch(step)).square().mean()
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: Any, steps: int, start: int = 0) -> None:
    """A plain training loop."""
    for step in range(start, start + steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def wrapped(
    model: nn.Module, rule: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any
) -> DynamicAllocationOptimizer:
    """A DynamicAllocationOptimizer over ``rule`` with a rate at which a stray update shows.

    ``active`` is left out where the allocator makes no use of it.
    """
    if not uses_active(options.get("allocator")):
        options.pop("active", None)
    rate = options.pop("lr", 0.05)
    return DynamicAllocationOptimizer(rule(model.parameters(), lr=rate), model, **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit-for-bit equality of two sets of weights."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def living_tensors() -> dict[int, Tensor]:
    """All tensors that there are, by identity. Who holds them can tell which come later."""
    gc.collect()
    return {id(thing): thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)}
