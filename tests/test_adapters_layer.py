"""LoRALinear by itself: what it computes, what it saves, and where it runs."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dynalora_adapters import LoRALinear

sizes = st.integers(1, 9)
floats = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def trained(base: nn.Module, **options: Any) -> LoRALinear:
    """A layer whose B is not zero."""
    layer = LoRALinear(base, **{"rank": 3, "alpha": 6, **options})
    nn.init.normal_(layer.lora_B, std=0.5)
    base.requires_grad_(False)
    return layer


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


@given(rows=sizes, in_=sizes, out=sizes, rank=st.integers(1, 12), rslora=st.booleans())
def test_the_output_is_that_of_the_summed_weight(
    rows: int, in_: int, out: int, rank: int, rslora: bool
) -> None:
    base = nn.Linear(in_, out).double()
    layer = trained(base, rank=rank, alpha=5, rslora=rslora)
    scaling = 5 / rank**0.5 if rslora else 5 / rank
    weight = base.weight + scaling * layer.lora_B @ layer.lora_A
    x = torch.randn(2, rows, in_, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, base.bias))
    torch.testing.assert_close(layer.delta_weight(), weight - base.weight)


@given(dtype=floats, rows=st.integers(0, 4), dropout=st.sampled_from([0.0, 0.5]))
def test_a_new_adapter_changes_no_bit_of_the_output(
    dtype: torch.dtype, rows: int, dropout: float
) -> None:
    base = nn.Linear(5, 4).to(dtype)
    x = torch.randn(rows, 5, dtype=dtype)
    expected = base(x)
    out = LoRALinear(base, rank=2, alpha=4, dropout=dropout)(x)
    assert out.dtype == dtype
    assert torch.equal(out, expected)


@given(dtype=floats)
def test_adapters_are_float32_over_half_precision_and_double_over_double(
    dtype: torch.dtype,
) -> None:
    layer = LoRALinear(nn.Linear(5, 4).to(dtype), rank=2, alpha=4)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.lora_A.dtype == layer.lora_B.dtype == expected


def test_gradients_are_those_of_the_closed_form() -> None:
    layer = trained(nn.Linear(5, 4).double())
    x, seed = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    layer(x).backward(seed)
    torch.testing.assert_close(layer.lora_B.grad, layer.scaling * seed.T @ x @ layer.lora_A.T)
    torch.testing.assert_close(layer.lora_A.grad, layer.scaling * layer.lora_B.T @ seed.T @ x)
    assert layer.base_layer.weight.grad is None


def test_idle_gives_the_same_output_and_input_gradient_but_none_of_its_own() -> None:
    layer = trained(nn.Linear(5, 4))
    results = []
    for active in (True, False):
        layer.active = active
        x = torch.arange(10.0).view(2, 5).requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        results.append((out, x.grad))
        if active:
            assert layer.lora_A.grad is not None
            layer.zero_grad()
    for on, off in zip(*results, strict=True):
        assert torch.equal(on, off)
    assert layer.lora_A.grad is None
    assert layer.lora_B.grad is None
    assert layer.lora_A.requires_grad
    assert layer.lora_B.requires_grad


@pytest.mark.parametrize("input_requires_grad", [True, False])
def test_idle_keeps_nothing_that_the_bare_base_would_not_keep(input_requires_grad: bool) -> None:
    base = nn.Linear(50, 40).requires_grad_(False)
    layer = trained(base)
    x = torch.randn(30, 50, requires_grad=input_requires_grad)
    bare = saved_bytes(base, x)
    active = saved_bytes(layer, x)
    layer.active = False
    idle = saved_bytes(layer, x)
    assert idle == bare
    assert active - idle == 4 * 30 * (50 + layer.rank)  # x and xA^T, float32


def test_dropout_falls_on_the_delta_only_and_only_in_training() -> None:
    layer = trained(nn.Linear(50, 4), dropout=0.5)
    x = torch.randn(3, 50)
    torch.manual_seed(5)
    kept = nn.functional.dropout(x, 0.5)
    torch.manual_seed(5)
    expected = layer.base_layer(x) + kept @ layer.delta_weight().T
    torch.testing.assert_close(layer(x), expected)
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ layer.delta_weight().T)


def test_the_mode_of_the_base_is_taken_over() -> None:
    assert not LoRALinear(nn.Linear(3, 3).eval(), rank=1, alpha=1, dropout=0.9).dropout.training


def test_the_protocol_of_the_optimizer_names_trainable_parameters() -> None:
    layer = LoRALinear(nn.Linear(3, 3), rank=1, alpha=1)
    assert layer.adapter_params() == ["lora_A", "lora_B"]
    assert all(isinstance(getattr(layer, name), nn.Parameter) for name in layer.adapter_params())
    assert layer.active is True


def test_what_models_read_from_a_linear_layer_is_the_bases() -> None:
    base = nn.Linear(5, 4, bias=False)
    layer = LoRALinear(base, rank=2, alpha=4)
    assert layer.weight is base.weight
    assert layer.bias is None
    assert (layer.in_features, layer.out_features) == (5, 4)
    assert "rank=2, alpha=4, active=True" in repr(layer)


def test_quantised_linear_modules_are_adapted_by_composition() -> None:
    class Packed(nn.Module):
        """Ternary weights, two of which share a byte: its weight is (out * in / 2, 1) uint8."""

        in_features, out_features, bias = 4, 6, None

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(
                torch.randint(0, 9, (12, 1), dtype=torch.uint8), requires_grad=False
            )

        def forward(self, x: Tensor) -> Tensor:
            unpacked = torch.cat([self.weight % 3, self.weight // 3], 1).float() - 1
            return x @ unpacked.view(6, 4).T

    base = Packed()
    layer = LoRALinear(base, rank=2, alpha=4)
    x = torch.randn(5, 4)
    assert layer.lora_A.dtype == torch.float32
    assert torch.equal(layer(x), base(x))
    nn.init.normal_(layer.lora_B)
    torch.testing.assert_close(layer(x), base(x) + x @ layer.delta_weight().T)


@pytest.mark.parametrize(
    "base", [nn.Embedding(5, 4), nn.LayerNorm(4), nn.Conv1d(3, 3, 1), nn.LazyLinear(3)]
)
def test_other_modules_are_refused_by_class_name(base: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"base_layer must be a linear .* {type(base).__name__}"):
        LoRALinear(base, rank=2, alpha=4)


def test_options_are_checked_as_the_configurations_are() -> None:
    for option, value in {"rank": 0, "alpha": -1, "dropout": 1.0}.items():
        with pytest.raises(ValueError, match=f"{option} must"):
            LoRALinear(nn.Linear(2, 2), **{"rank": 1, "alpha": 1, option: value})


def test_copies_are_equal_and_independent() -> None:
    layer = trained(nn.Linear(5, 4))
    layer.active = False
    x = torch.randn(2, 5)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), layer(x))
        assert twin.active is False
        twin.lora_B.data.zero_()
        assert not torch.equal(twin(x), layer(x))


def test_empty_and_strided_batches() -> None:
    layer = trained(nn.Linear(5, 4))
    assert layer(torch.empty(0, 7, 5)).shape == (0, 7, 4)
    x = torch.randn(5, 3).T
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_autocast_computes_the_delta_in_low_precision_and_trains_in_float32() -> None:
    layer = trained(nn.Linear(16, 8))
    x = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), atol=0.1, rtol=0.05)
    out.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


def test_functional_call_and_per_sample_gradients() -> None:
    layer = trained(nn.Linear(5, 4))
    x = torch.randn(3, 5)
    params = {name: getattr(layer, name).detach() for name in layer.adapter_params()}

    def loss(params: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(layer, params, (row,)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    layer(x).square().sum().backward()
    torch.testing.assert_close(grads["lora_A"].sum(0), layer.lora_A.grad)
    doubled = {name: 2 * value for name, value in params.items()}
    expected = layer.base_layer(x) + 4 * x @ layer.delta_weight().T
    torch.testing.assert_close(torch.func.functional_call(layer, doubled, (x,)), expected)
