"""The kinds of modules that can be inactive, each in a small model, and their plain-torch twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from toy import ToyAdapter, ToyModel, weights, wrapped

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import DynamicAllocationOptimizer


class Foreign(nn.Module):
    """A layer of some other library: no flag, so that it is made inactive from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.raises: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.raises:
            raise self.raises
        return torch.tanh(self.inner(x))


def foreign_groups(name: str, module: nn.Module) -> str | None:
    """The rule that makes each `Foreign` a group."""
    return name if isinstance(module, Foreign) else None


class Block(nn.Module):
    """One of the blocks of `Blocks`."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = ToyAdapter(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.adapter(x))


class Blocks(nn.Module):
    """A model with blocks, for budgets."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def lora() -> nn.Module:
    """Four linear layers with our LoRA, and a head."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)]
    model = nn.Sequential(*layers, nn.Linear(8, 3))
    inject(model, LoRAConfig(rank=2, alpha=4, targets=r"\d\.0", trainable=["4"]))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3)
    return model


def foreign() -> nn.Module:
    """Four foreign layers and a head."""
    torch.manual_seed(0)
    return nn.Sequential(*(Foreign() for _ in range(4)), nn.Linear(8, 3))


KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "flagged": (ToyModel, {}),
    "lora": (lora, {}),
    "foreign": (foreign, {"groups": foreign_groups}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind: str, **options: Any) -> tuple[nn.Module, DynamicAllocationOptimizer]:
    """A model of that kind and its optimizer, which reallocates every second step."""
    make, rule = KINDS[kind]
    model = make()
    return model, wrapped(model, **{"period": 2, **rule, **options})


def assert_as_torch(
    kind: str, loop: Callable[[nn.Module, Optimizer], object], **options: Any
) -> dict[str, Tensor] | type[Exception]:
    """Compare ``loop`` with all modules active to ``loop`` with the plain optimizer.

    Returns:
        The weights that both leave, or the kind of the error that ends both.
    """

    def ended(model: nn.Module, optimizer: Optimizer) -> type[Exception] | None:
        try:
            loop(model, optimizer)
        except (RuntimeError, ValueError, TypeError) as error:
            return type(error)
        return None

    make, rule = KINDS[kind]
    plain, ours = make(), make()
    inner = AdamW(ours.parameters(), lr=0.05)
    wrapper = DynamicAllocationOptimizer(
        inner, ours, **{"active": 1.0, "period": 2, **rule, **options}
    )
    end = ended(plain, AdamW(plain.parameters(), lr=0.05))
    assert ended(ours, wrapper) == end
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(ours)[name], weight, rtol=0, atol=0, equal_nan=True)
    return end or weights(plain)


def decided(optimizer: DynamicAllocationOptimizer) -> Any:
    """What was chosen so far, by which scores, and what is active now."""
    return optimizer.record.state_dict(), optimizer.tracker.scores(), optimizer.active_groups


def hooks(model: nn.Module) -> int:
    """The number of all hooks and patched forwards in ``model``."""
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m))
        for m in model.modules()
    ) + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
