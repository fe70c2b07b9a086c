"""LoRALinear in one step of autograd: the same numbers as base plus delta, kept in less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dynalora_adapters import LoRAConfig, LoRALinear, inject, merge
from dynalora_adapters._layers import AdapterLinear

Run = tuple[Tensor, ...]


def adapted(base: nn.Module, **options: Any) -> LoRALinear:
    """A layer over a frozen base, with a B that is not zero."""
    layer = LoRALinear(base.requires_grad_(False), **{"rank": 3, "alpha": 5, **options})
    nn.init.normal_(layer.lora_B, std=0.5)
    return layer


def conv1d(in_: int, out: int) -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(out, in_)


def pefts(layer: LoRALinear, **options: Any) -> nn.Module:
    """peft's layer over the same base, with the same adapter."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=layer.rank, lora_alpha=layer.alpha, target_modules=["0"], **options)
    twin = peft.get_peft_model(nn.Sequential(layer.base_layer), config).base_model.model[0]
    twin.lora_A.default.weight.data.copy_(layer.lora_A.data)
    twin.lora_B.default.weight.data.copy_(layer.lora_B.data)
    return twin


def composed(layer: LoRALinear, x: Tensor) -> Tensor:
    """Base plus delta by ordinary operations."""
    return AdapterLinear.forward(layer, x)


def run(call: Callable[[Tensor], Tensor], params: list[Tensor], x: Tensor, seed: Tensor) -> Run:
    """The output of ``call`` and the gradients of those of x and the parameters that need one."""
    out = call(x)
    needed = [tensor for tensor in (x, *params) if tensor.requires_grad]
    return (out, *torch.autograd.grad(out, needed, seed)) if needed else (out,)


def assert_close(ours: Run, theirs: Run, tolerance: float) -> None:
    """Equal dtypes, and errors below ``tolerance`` times the largest element (at least 1)."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        largest = max([1.0, *other.detach().abs().flatten().tolist()])
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance * largest)


def factors(layer: nn.Module) -> list[Tensor]:
    return [p for name, p in layer.named_parameters() if "lora_" in name]


def kept(call: Callable[[], object], module: nn.Module) -> list[int]:
    """Bytes of each storage that autograd keeps for the backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)  # or its address would be given out again
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sorted(storages.values())


class Count(TorchDispatchMode):
    """Counts the operations that reach a backend."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def operations(layer: nn.Module, x: Tensor) -> int:
    with Count() as count:
        layer(x).sum().backward()
    return count.calls


@st.composite
def inputs(draw: st.DrawFn, dtype: torch.dtype) -> tuple[LoRALinear, Tensor, Tensor]:
    """A layer, an input of 1 to 4 dimensions and a gradient, both perhaps strided or empty."""
    torch.manual_seed(draw(st.integers(0, 999)))
    in_, out = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    base = nn.Linear(in_, out, bias=draw(st.booleans())).to(dtype)
    layer = adapted(base, rank=draw(st.integers(1, 5)), alpha=draw(st.sampled_from([1, 6])))
    lead = draw(st.lists(st.integers(0, 4), max_size=3))

    def tensor(size: int) -> Tensor:
        kind = draw(st.sampled_from(["plain", "sliced", "permuted", "expanded"]))
        if kind == "sliced":
            return torch.randn(*lead, 2 * size, dtype=dtype)[..., ::2]
        if kind == "permuted":
            return torch.randn(size, *lead[::-1], dtype=dtype).permute(*range(len(lead), -1, -1))
        return torch.randn(*lead, 1 if kind == "expanded" else size, dtype=dtype).expand(
            *lead, size
        )

    x, seed = tensor(in_), tensor(out)
    x.requires_grad_(draw(st.booleans()))
    layer.lora_A.requires_grad_(draw(st.booleans()))
    layer.lora_B.requires_grad_(draw(st.booleans()))
    return layer, x, seed


def reference(layer: LoRALinear, x: Tensor) -> Tensor:
    base, delta = layer.base_layer, F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    return F.linear(x, base.weight, base.bias) + layer.scaling * delta


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@given(data=st.data())
def test_outputs_and_gradients_are_those_of_the_composition(
    dtype: torch.dtype, tolerance: float, data: st.DataObject
) -> None:
    layer, x, seed = data.draw(inputs(dtype))
    expected = run(lambda x: reference(layer, x), factors(layer), x, seed)
    assert_close(run(layer, factors(layer), x, seed), expected, tolerance)
    with torch.no_grad():
        layer.lora_B.zero_()
        assert torch.equal(layer(x), layer.base_layer(x)), "without B, the base's bits"


@pytest.mark.parametrize("trained", ["x", "A", "B", "xA", "xB", "AB", "xAB"])
def test_first_and_second_derivatives(trained: str) -> None:
    layer = adapted(nn.Linear(4, 3).double())
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    every = {"x": x, "A": layer.lora_A.detach(), "B": layer.lora_B.detach()}
    needed = [tensor.clone().requires_grad_(name in trained) for name, tensor in every.items()]

    def call(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    assert torch.autograd.gradcheck(call, needed, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, needed)


def test_a_layer_used_twice_gathers_both_gradients(lean_passes: list[int]) -> None:
    layer = adapted(nn.Linear(4, 4).double())
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(4, dtype=torch.float64).expand(2, 5, 4)
    ours = run(lambda x: layer(layer(x).relu_()), factors(layer), x, seed)
    assert len(lean_passes) == 2
    expected = run(lambda x: composed(layer, composed(layer, x).relu()), factors(layer), x, seed)
    assert_close(ours, expected, 1e-12)


def test_an_adapter_adds_less_than_half_of_pefts_operations() -> None:
    layer, x = adapted(nn.Linear(5, 4)), torch.randn(2, 3, 5, requires_grad=True)
    bare, ours, theirs = (operations(m, x) for m in (layer.base_layer, layer, pefts(layer)))
    most = 12 if torch.__version__ >= (2, 11) else 13  # torch 2.8 dispatches one more of its own
    assert ours - bare <= min(most, (theirs - bare) / 2)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("x_needed", [True, False])
def test_the_input_and_the_ranks_are_all_that_is_kept(x_needed: bool, low: bool) -> None:
    layer = adapted(nn.Linear(50, 40))

    def bytes_of(module: nn.Module, dtype: torch.dtype) -> list[int]:
        x = torch.randn(2, 15, 50, dtype=dtype, requires_grad=x_needed)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return kept(lambda: module(x), module)

    dtype = torch.bfloat16 if low else torch.float32
    assert bytes_of(layer, dtype) == [30 * size * dtype.itemsize for size in (3, 50)]
    assert sum(bytes_of(layer, dtype)) <= sum(bytes_of(pefts(layer), dtype))
    assert bytes_of(layer, torch.float32)[1:] == [30 * 50 * 4], "x as given, no copy of it"
    layer.lora_B.requires_grad_(False)
    assert bytes_of(layer, dtype) == [30 * 50 * dtype.itemsize]
    layer.active = False
    assert bytes_of(layer, dtype) == []


def test_an_inactive_layer_pays_for_the_input_gradient_only(lean_passes: list[int]) -> None:
    layer = adapted(nn.Linear(5, 4))
    x, seed = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 4)
    active, count = run(layer, [], x, seed), operations(layer, x)
    layer.active = False
    assert all(torch.equal(a, b) for a, b in zip(active, run(layer, [], x, seed), strict=True))
    assert count - operations(layer, x) >= 4  # two products, each of a transposed matrix
    assert len(lean_passes) == 4


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward_too", [False, True])
def test_autocast_agrees_with_peft(x_dtype: torch.dtype, backward_too: bool) -> None:
    layer = adapted(nn.Linear(48, 32))
    x = torch.randn(2, 9, 48, dtype=x_dtype, requires_grad=True)
    results = []
    for module in (layer, pefts(layer)):
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_too):
            grads = torch.autograd.grad(out.float().cos().sum(), [x, *factors(module)])
        results.append((out, *grads))
    assert_close(*results, 0.05)


def test_autocast_leaves_double_precision_alone() -> None:
    layer, x = adapted(nn.Linear(5, 4).double()), torch.randn(3, 5, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close((layer(x),), (composed(layer, x),), 1e-12)


def test_a_backward_under_autocast_keeps_the_precision_of_the_forward() -> None:
    layer, x = adapted(nn.Linear(48, 32)), torch.randn(9, 48, requires_grad=True)
    out, needed = layer(x).sum(), [x, *factors(layer)]
    plain = torch.autograd.grad(out, needed, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(torch.autograd.grad(out, needed), plain, 0)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_float32_adapters_over_a_half_precision_base(
    half: torch.dtype, lean_passes: list[int]
) -> None:
    """The products are in half precision, as under autocast; A, B and their gradients are not."""
    layer = adapted(nn.Linear(48, 32).to(half))
    x = torch.randn(2, 9, 48, dtype=half, requires_grad=True)
    seed = torch.randn(2, 9, 32, dtype=half)
    ours = run(layer, factors(layer), x, seed)
    assert kept(lambda: layer(x), layer) == [18 * 3 * 2, 18 * 48 * 2]
    assert [g.dtype for g in ours] == [half, half, torch.float32, torch.float32]
    expected = run(lambda x: composed(layer, x), factors(layer), x, seed)
    assert len(lean_passes) == 2
    assert_close(ours, expected, 4 * torch.finfo(half).eps)
    with torch.autocast("cpu", half):
        assert_close(run(layer, factors(layer), x, seed), ours, 0)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_with_pefts_products_in_float32(half: torch.dtype) -> None:
    layer = adapted(nn.Linear(48, 32).to(half))
    x = torch.randn(2, 9, 48, dtype=half, requires_grad=True)
    seed, twin = torch.randn(2, 9, 32, dtype=half), pefts(layer)
    assert twin.lora_A.default.weight.dtype == torch.float32
    ours, theirs = (run(m, factors(m), x, seed) for m in (layer, twin))
    assert_close(ours, theirs, 8 * torch.finfo(half).eps)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("make", [nn.Linear, conv1d])
def test_outputs_gradients_and_draws_are_pefts(
    make: Callable[[int, int], nn.Module], dropout: float, lean_passes: list[int]
) -> None:
    layer = adapted(make(6, 4), dropout=dropout)
    options = {"lora_dropout": dropout, "fan_in_fan_out": make is conv1d}
    twin, x, seed = pefts(layer, **options), torch.randn(2, 5, 6), torch.randn(2, 5, 4)
    results = []
    for module in (layer, twin):
        torch.manual_seed(3)
        results.append(run(module, factors(module), x.clone().requires_grad_(), seed))
    assert bool(lean_passes) is (dropout == 0)
    assert_close(*results, 2e-6)
    layer.eval()(x)
    assert lean_passes, "nothing is dropped in evaluation"


def transpose_in(kind: type) -> type:
    return type("Transposing", (kind,), {"forward": lambda _, x: x.mT, "delta": lambda _, x: x.mT})


def marked(weight: Tensor) -> nn.Parameter:
    subclass = type("Marked", (Tensor,), {})
    return nn.Parameter(weight.detach().as_subclass(subclass), requires_grad=False)


CHANGES: dict[str, Callable[[LoRALinear, nn.Module], object]] = {
    "hook": lambda _, base: base.register_forward_hook(lambda *_: None),
    "pre-hook": lambda _, base: base.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda _, base: base.register_full_backward_hook(lambda *_: None),
    "forward": lambda _, base: setattr(base, "forward", torch.t),
    "subclass": lambda _, base: setattr(base, "__class__", transpose_in(nn.Linear)),
    "weight's class": lambda _, base: setattr(base, "weight", marked(base.weight)),
    "parametrized": lambda _, base: nn.utils.parametrizations.orthogonal(base).requires_grad_(
        False
    ),
    "weight trains": lambda _, base: base.weight.requires_grad_(),
    "bias trains": lambda _, base: base.bias.requires_grad_(),
    "delta": lambda layer, _: setattr(layer, "delta", torch.t),
    "narrow": lambda layer, base: base.double(),
    "merged": lambda layer, _: merge(nn.Sequential(layer)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_a_plain_frozen_linear_computes_by_itself(
    change: str, lean_passes: list[int]
) -> None:
    layer, x = adapted(nn.Linear(5, 5)), torch.randn(5, 5)
    layer(x)
    assert len(lean_passes) == 1
    CHANGES[change](layer, layer.base_layer)
    x = x.to(layer.weight.dtype)
    assert_close((layer(x),), (composed(layer, x),), 0)
    assert len(lean_passes) == 1


def test_arguments_of_the_base_reach_it() -> None:
    layer, x = adapted(nn.Linear(5, 5)), torch.randn(5, 5)
    with pytest.raises(TypeError, match="unexpected keyword"):
        layer(x, scale=2)


def test_a_hook_on_the_base_sees_the_base_alone() -> None:
    layer, x, seen = adapted(nn.Linear(5, 4)), torch.randn(2, 3, 5), []
    expected = layer.base_layer(x)
    for register in (
        layer.base_layer.register_forward_hook,
        nn.modules.module.register_module_forward_hook,
    ):
        handle = register(lambda module, _, out: seen.append((module, out)))
        layer(x)
        handle.remove()
        assert torch.equal(next(out for m, out in seen if m is layer.base_layer), expected)
        seen.clear()


def test_nested_inputs(lean_passes: list[int]) -> None:
    layer, rows = adapted(nn.Linear(5, 4)), [torch.randn(2, 5), torch.randn(3, 5)]
    for layout in (torch.strided, torch.jagged):
        out = layer(torch.nested.nested_tensor(rows, layout=layout))
        assert not lean_passes
        for mine, row in zip(out.unbind(), rows, strict=True):
            torch.testing.assert_close(mine, composed(layer, row))


def test_forward_mode_tracers_and_compilers() -> None:
    layer, x = adapted(nn.Linear(5, 4)), torch.randn(3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, x)).square().sum()
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, (grad * x).sum())
    torch.jit.trace(layer, x).save_to_buffer()  # which no Python function would survive
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(torch.autograd.grad(compiled(x).square().sum(), x), (grad,), 1e-6)


def test_gpt2_trains_alike_in_fewer_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    tiny = build("gpt2")
    inject(tiny.model, LoRAConfig(rank=2, alpha=4, targets="all-linear"))
    for name, param in tiny.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1)
    results = []
    for _ in ("ours", "composed"):
        tiny.model.zero_grad()
        with Count() as count:
            tiny.loss().backward()
        results.append((count.calls, [p.grad.clone() for p in factors(tiny.model)]))
        monkeypatch.setattr(LoRALinear, "forward", AdapterLinear.forward)
    (ours, grads), (theirs, expected) = results
    assert ours < theirs
    torch.testing.assert_close(grads, expected)
