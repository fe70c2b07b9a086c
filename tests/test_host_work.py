"""What a step costs the host: counts of Python calls and of operations, which bound a GPU's step.

Times are not asserted. A count is compared with peft's, or with what the code needs today.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dynalora_adapters import LoRAConfig, LoRALinear, inject
from dynalora_optim import Budget, DynamicAllocationOptimizer
from dynalora_optim.importance._forward_hook import ForwardHook

OURS = tuple(
    str(Path(sys.modules[name].__file__ or "").parent)
    for name in ("dynalora_adapters", "dynalora_optim")
)
LAYERS, LINEAR = 4, 7  # blocks, and adapted layers in each


class Operations(TorchDispatchMode):
    """Counts the operations that reach a backend."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(work: Callable[[], object]) -> int:
    with Operations() as seen:
        work()
    return seen.count


def calls(work: Callable[[], object]) -> int:
    """Count the calls of Python functions of this project; those of torch differ by version."""
    found = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal found
        found += event == "call" and frame.f_code.co_filename.startswith(OURS)

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).to(torch.bfloat16).train()
    return model


def ours() -> nn.Module:
    model = inject(llama(), LoRAConfig(rank=2, alpha=4, targets="all-linear"))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


def pefts() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    model: nn.Module = peft.get_peft_model(llama(), config)
    return model


class Loop:
    """A training loop whose steps are alike, from the second on."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model = model
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: Any = torch.optim.AdamW(trained, lr=1e-3)
        if options:
            self.optimizer = DynamicAllocationOptimizer(self.optimizer, model, **options)
        self.ids = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(1))

    def forward(self) -> Tensor:
        loss: Tensor = self.model(input_ids=self.ids, labels=self.ids).loss
        return loss

    def passes(self) -> None:
        self.forward().backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self.passes()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def settled(self) -> Loop:
        for _ in range(3):
            self.step()
        return self


def upper_half(model: nn.Module) -> list[str]:
    found = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    return [name for name in found if int(name.split("layers.")[1][0]) >= LAYERS // 2]


def budget(*, half: bool = False) -> Loop:
    loop = Loop(ours(), allocator=Budget(memory=1.0), period=10**6)
    loop.step()
    loop.optimizer.hold(upper_half(loop.model) if half else loop.optimizer.groups)
    return loop.settled()


# Against peft


def test_a_step_dispatches_fewer_operations_than_pefts():
    theirs = operations(Loop(pefts()).settled().passes)
    assert operations(Loop(ours(), active=1.0).settled().passes) < 0.85 * theirs
    assert operations(budget().passes) < 0.85 * theirs
    assert operations(budget(half=True).passes) < 0.65 * theirs


# Against what was needed once


def test_an_adapted_layer_takes_few_calls():
    layer = LoRALinear(nn.Linear(4, 4).requires_grad_(False), rank=2, alpha=4)
    x = torch.randn(2, 3, 4)
    assert calls(lambda: layer(x)) <= 35  # it was 43
    layer.active = False
    assert calls(lambda: layer(x)) <= 31  # it was 43


def test_scoring_a_layer_takes_few_calls():
    loop = Loop(ours(), active=1.0).settled()
    hooks = (hook for module in loop.model.modules() for hook in module._forward_hooks.values())
    hook = next(hook for hook in hooks if isinstance(hook, ForwardHook))
    x = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    assert calls(lambda: hook(hook._module, (x,), x)) <= 15


def test_a_forward_with_a_budget_takes_few_calls_besides_those_of_its_layers():
    plain = Loop(ours(), active=1.0).settled()
    layers = calls(plain.forward)
    assert calls(budget().forward) - layers <= 480  # it was 675


def test_a_forward_with_a_budget_does_not_look_through_the_model(monkeypatch):
    loop = budget()
    looked = []
    inner = nn.Module.named_modules

    def named_modules(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        looked.append(self)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", named_modules)
    loop.passes()
    assert loop.model not in looked


# Without a node of autograd


def test_blocks_below_the_lowest_active_one_make_no_nodes(lean_passes):
    loop = budget(half=True)
    lean_passes.clear()
    loop.forward()
    assert len(lean_passes) == LAYERS // 2 * LINEAR


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (0, 4)])
def test_the_output_is_the_same_to_the_bit_with_a_node_and_without(
    dtype, autocast, shape, lean_passes
):
    torch.manual_seed(0)
    base = nn.Linear(4, 5).to(dtype).requires_grad_(False)
    layer = LoRALinear(base, rank=2, alpha=3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(shape, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = layer(x)
        assert len(lean_passes) == 1
        layer.active = False
        idle = layer(x)
        with torch.no_grad():
            layer.active = True
            unrecorded = layer(x)
    assert len(lean_passes) == 1
    assert expected.requires_grad
    assert not idle.requires_grad
    assert torch.equal(idle, expected)
    assert torch.equal(unrecorded, expected)


def test_an_idle_layer_passes_a_gradient_on():
    layer = LoRALinear(nn.Linear(4, 5).requires_grad_(False), rank=2, alpha=3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    layer.active = False
    layer(x).sum().backward()
    assert torch.equal(x.grad, expected)
    assert layer.lora_A.grad is None
    assert layer.lora_B.grad is None


def test_the_output_of_a_layer_without_a_node_can_be_changed_in_place():
    layer = LoRALinear(nn.Linear(4, 5).requires_grad_(False), rank=2, alpha=3)
    layer.active = False
    scale = torch.ones(5, requires_grad=True)
    out = layer(torch.randn(2, 3, 4))
    out += scale  # as a model adds in place
    out.sum().backward()
    assert torch.equal(scale.grad, torch.full((5,), 6.0))
