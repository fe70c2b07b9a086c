"""LoRA over the last layer of an MLP keeps no input that autograd can compute again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dynalora_adapters import LoRALinear
from dynalora_adapters import _torch_private_recipes as _recipes
from dynalora_optim import LiveBytes

ROWS, IN, OUT, RANK = 64, 32, 8, 3
FLOAT = 4
Making = Callable[[Tensor, Tensor], Tensor]

PRODUCTS: dict[str, Making] = {
    "gated": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate),
    "gelu, tanh": lambda gate, up: F.gelu(gate, approximate="tanh"),
    "silu": lambda gate, up: F.silu(gate),
    "broadcast": lambda gate, up: gate * up[:1],
}
OTHERS: dict[str, Making] = {
    "relu": lambda gate, up: gate.relu(),  # keeps its own result
    "scaled": lambda gate, up: gate * 2.0,
    "mask": lambda gate, up: gate * torch.ones_like(gate),  # keeps the mask alone
    "sum": lambda gate, up: gate + up,
    "view": lambda gate, up: (gate * up).view(ROWS, IN),
    "changed": lambda gate, up: (gate * up).mul_(3.0),
    "changed in secret": lambda gate, up: halved(gate * up),
}


def halved(x: Tensor) -> Tensor:
    with torch.no_grad():
        x[: len(x) // 2] = 0
    return x


@pytest.fixture
def layer() -> LoRALinear:
    torch.manual_seed(0)
    found = LoRALinear(nn.Linear(IN, OUT).requires_grad_(False), rank=RANK, alpha=6)
    nn.init.normal_(found.lora_B)
    return found


@pytest.fixture
def operands() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(ROWS, IN, requires_grad=True), torch.randn(ROWS, IN, requires_grad=True)


def gradients(layer: LoRALinear, make: Making, operands: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Gradients of adapter and operands: leaves are computed on, as an MLP computes on theirs."""
    gate, up = (x * 1.5 for x in operands)
    needed = [layer.lora_A, layer.lora_B, *operands]
    out = layer(make(gate, up)).cos().sum()
    return [g for g in torch.autograd.grad(out, needed, allow_unused=True) if g is not None]


def held(layer: LoRALinear, make: Making, operands: tuple[Tensor, Tensor]) -> int:
    """Bytes that the layer keeps alive beyond what the operations before it keep."""
    gate, up = (x * 1.5 for x in operands)
    with LiveBytes() as memory:
        x = make(gate, up)
        before = memory.live - memory.size([x])
        out = layer(x)
        del x
        return memory.live - memory.size([out]) - before


@pytest.mark.parametrize("how", [*PRODUCTS, *OTHERS])
def test_gradients_are_those_of_a_kept_input_bit_for_bit(how, layer, operands, monkeypatch):
    make = {**PRODUCTS, **OTHERS}[how]
    lean = gradients(layer, make, operands)
    monkeypatch.setattr("dynalora_adapters._lora_function.recipe_of", lambda x: None)
    for ours, kept in zip(lean, gradients(layer, make, operands), strict=True):
        assert torch.equal(ours, kept)


@pytest.mark.parametrize("how", PRODUCTS)
def test_only_the_ranks_are_kept(how, layer, operands):
    assert held(layer, PRODUCTS[how], operands) == ROWS * RANK * FLOAT


@pytest.mark.parametrize("how", ["scaled", "mask", "sum", "changed", "changed in secret"])
def test_what_cannot_be_computed_again_is_kept(how, layer, operands):
    assert held(layer, OTHERS[how], operands) == ROWS * (RANK + IN) * FLOAT


def test_second_derivatives_go_through_the_operands(layer):
    layer = layer.double()

    def call(gate: Tensor, up: Tensor) -> Tensor:
        return layer((gate * 1.0) * (up * 1.0))

    inputs = [torch.randn(2, IN, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_under_checkpoints_of_the_layer_or_of_its_input_alone(reentrant, whole, layer, operands):
    make = PRODUCTS["gated"]
    expected = gradients(layer, make, operands)
    if whole:
        inner = lambda gate, up: layer(make(gate, up))  # noqa: E731
        step = lambda gate, up: checkpoint(inner, gate, up, use_reentrant=reentrant)  # noqa: E731
    else:
        step = lambda gate, up: layer(checkpoint(make, gate, up, use_reentrant=reentrant))  # noqa: E731
    step(*(x * 1.5 for x in operands)).cos().sum().backward()
    found = [layer.lora_A.grad, layer.lora_B.grad, *(x.grad for x in operands)]
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain)


def test_hooks_on_saved_tensors_see_the_input_as_before(layer, operands):
    seen: list[tuple[int, ...]] = []
    product = PRODUCTS["gated"](*(x * 1.5 for x in operands))
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: (seen.append(tuple(x.shape)), x)[1], lambda x: x
    )
    with hooks:
        layer(product)
    assert (ROWS, IN) in seen


def test_without_the_private_name_of_torch_the_input_is_kept(layer, operands, monkeypatch):
    monkeypatch.setattr(_recipes, "saving_is_watched", lambda: True)
    kept = held(layer, PRODUCTS["gated"], operands)
    assert kept == ROWS * (RANK + IN) * FLOAT


def test_an_inactive_layer_keeps_nothing(layer, operands):
    layer.active = False
    assert held(layer, PRODUCTS["gated"], operands) == 0
