"""VeRA: the layer's closed form, the shared projections, and the configuration."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import NAMES, Stack, build, randomize_trainable
from torch import Tensor, nn
from vera_models import adapted, layers_of

from dynalora_adapters import (
    VeRAConfig,
    VeRALinear,
    inject,
)

GOOD = {"rank": 8, "targets": ["query"]}

sizes = st.integers(1, 9)
keys = st.integers(-(2**63), 2**64 - 1)
floats = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def trained(base: nn.Module, **options: Any) -> VeRALinear:
    """A layer whose b is not zero."""
    layer = VeRALinear(base, **{"rank": 3, **options})
    nn.init.normal_(layer.vera_lambda_b)
    nn.init.normal_(layer.vera_lambda_d)
    base.requires_grad_(False)
    return layer


def closed_form(layer: VeRALinear) -> Tensor:
    """Lambda_b B Lambda_d A, written as the paper writes it."""
    A = layer.projections.A[:, : layer.in_features]
    B = layer.projections.B[: layer.out_features]
    return torch.diag(layer.vera_lambda_b) @ B @ torch.diag(layer.vera_lambda_d) @ A


# The layer


@given(rows=sizes, in_=sizes, out=sizes, rank=sizes, key=keys)
def test_the_output_is_that_of_the_summed_weight(
    rows: int, in_: int, out: int, rank: int, key: int
) -> None:
    base = nn.Linear(in_, out).double()
    layer = trained(base, rank=rank, key=key)
    x = torch.randn(2, rows, in_, dtype=torch.float64)
    weight = base.weight + closed_form(layer)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, base.bias))
    torch.testing.assert_close(layer.delta_weight(), weight - base.weight)


@given(in_=sizes, out=sizes, rank=sizes)
def test_projections_stay_within_kaimings_bound(in_: int, out: int, rank: int) -> None:
    projections = VeRALinear(nn.Linear(in_, out), rank=rank).projections
    assert projections.A.abs().max() <= math.sqrt(6 / in_) * (1 + 1e-6)
    assert projections.B.abs().max() <= math.sqrt(6 / rank) * (1 + 1e-6)


@given(dtype=floats, rows=st.integers(0, 4), dropout=st.sampled_from([0.0, 0.5]))
def test_a_new_adapter_changes_no_bit_of_the_output_and_has_its_own_dtype(
    dtype: torch.dtype, rows: int, dropout: float
) -> None:
    base = nn.Linear(5, 4).to(dtype)
    x = torch.randn(rows, 5, dtype=dtype)
    layer = VeRALinear(base, rank=2, d_initial=0.25, dropout=dropout)
    out = layer(x)
    assert out.dtype == dtype
    assert torch.equal(out, base(x))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [layer.vera_lambda_b, layer.vera_lambda_d, *layer.projections.buffers()]
    assert {tensor.dtype for tensor in tensors} == {expected}
    assert torch.equal(layer.vera_lambda_d, torch.full((2,), 0.25, dtype=expected))


def test_gradients_are_those_of_the_closed_form_and_reach_the_vectors_only() -> None:
    layer = trained(nn.Linear(5, 4).double())
    x, seed = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    layer(x).backward(seed)
    A, B = layer.projections.A, layer.projections.B
    b, d = layer.vera_lambda_b.detach(), layer.vera_lambda_d.detach()
    torch.testing.assert_close(layer.vera_lambda_b.grad, (seed * ((x @ A.T * d) @ B.T)).sum(0))
    torch.testing.assert_close(layer.vera_lambda_d.grad, ((seed * b) @ B * (x @ A.T)).sum(0))
    assert layer.base_layer.weight.grad is None
    assert (A.requires_grad, B.requires_grad, A.grad, B.grad) == (False, False, None, None)
    assert {name for name, _ in layer.named_parameters(recurse=False)} == set(
        layer.adapter_params()
    )


def test_idle_gives_the_same_output_and_input_gradient_but_none_of_its_own() -> None:
    layer = trained(nn.Linear(5, 4))
    results = []
    for active in (True, False):
        layer.zero_grad()
        layer.active = active
        x = torch.arange(10.0).view(2, 5).requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        results.append((out, x.grad))
        for name in layer.adapter_params():
            assert (getattr(layer, name).grad is not None) is active
            assert getattr(layer, name).requires_grad
    for on, off in zip(*results, strict=True):
        assert torch.equal(on, off)


@pytest.mark.parametrize("active", [True, False])
def test_what_is_kept_for_the_backward_is_small(active: bool) -> None:
    layer = trained(nn.Linear(50, 40), rank=8)
    layer.active = active
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(30, 50))
    # A x and B (d * A x), of which the gradients of d and b are made; the input is not needed.
    assert sum(kept.values()) == (4 * 30 * (8 + 40) if active else 0)


def test_dropout_falls_on_the_delta_only() -> None:
    layer = trained(nn.Linear(50, 4), dropout=0.5)
    x = torch.randn(3, 50)
    torch.manual_seed(5)
    kept = nn.functional.dropout(x, 0.5)
    torch.manual_seed(5)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + kept @ layer.delta_weight().T)


def test_autocast_computes_in_low_precision_and_trains_in_float32() -> None:
    layer = trained(nn.Linear(16, 8))
    x = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), atol=0.1, rtol=0.05)
    out.float().sum().backward()
    assert layer.vera_lambda_b.grad.dtype == torch.float32


def test_functional_call_uses_the_vectors_it_is_given() -> None:
    layer = trained(nn.Linear(5, 4))
    x = torch.randn(3, 5)
    doubled = {name: 2 * getattr(layer, name).detach() for name in layer.adapter_params()}
    expected = layer.base_layer(x) + 4 * x @ layer.delta_weight().T
    torch.testing.assert_close(torch.func.functional_call(layer, doubled, (x,)), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"key": 2**64}, ValueError, "key must lie in"),
        ({"d_initial": 0.0}, ValueError, "d_initial must be finite and not 0"),
        ({"dropout": 1.0}, ValueError, "dropout must lie in"),
        ({"rank": 3}, ValueError, r"projections \(A=\(2, 4\), B=\(5, 2\)\) do not fit a layer of"),
        ({"base": nn.Linear(6, 5)}, ValueError, "do not fit .* with 6 inputs and 5 outputs"),
        ({"base": nn.Linear(4, 6)}, ValueError, "do not fit .* with 4 inputs and 6 outputs"),
        ({"base": nn.Embedding(4, 5)}, TypeError, "base_layer must be a linear .* Embedding"),
    ],
)
def test_a_layer_checks_its_options(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    projections = VeRALinear(nn.Linear(4, 5), rank=2).projections
    options = {"rank": 2, "projections": projections, **options}
    with pytest.raises(error, match=message):
        VeRALinear(options.pop("base", nn.Linear(4, 5)), **options)


# The shared projections


def check_shared(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """There is one A and one B, every layer cuts views out of them, and nobody else holds them."""
    layers = layers_of(model)
    assert len(layers) > 1
    assert len({id(layer.projections) for layer in layers}) == 1
    projections = layers[0].projections
    assert (projections.A.dtype, projections.B.dtype) == (dtype, dtype)
    for layer in layers:
        for cut, whole in zip(layer._cut(layer.vera_lambda_d), projections.buffers(), strict=True):
            assert cut.data_ptr() == whole.data_ptr()
    buffers = [name for name, _ in model.named_buffers() if "projections" in name]
    assert len(buffers) == 2
    assert not any("projections" in name for name in model.state_dict())
    assert not any("projections" in name for name, _ in model.named_parameters())


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def torch_saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_of_a_model_share_one_pair(name: str) -> None:
    tiny = adapted(name)
    check_shared(tiny.model)
    layers, projections = layers_of(tiny.model), layers_of(tiny.model)[0].projections
    assert projections.A.shape == (4, max(layer.in_features for layer in layers))
    assert projections.B.shape == (max(layer.out_features for layer in layers), 4)


@pytest.mark.parametrize("twin", [copy.deepcopy, pickled, torch_saved])
def test_copies_share_among_themselves_and_with_nobody_else(
    twin: Callable[[nn.Module], nn.Module],
) -> None:
    tiny = adapted()
    other = twin(tiny.model)
    check_shared(other)
    assert layers_of(other)[0].projections is not layers_of(tiny.model)[0].projections
    assert torch.equal(other(**tiny.batch).logits, tiny.logits())
    randomize_trainable(other)
    assert not torch.equal(other(**tiny.batch).logits, tiny.logits())


def test_casting_and_moving_the_model_keeps_one_pair() -> None:
    tiny = adapted()
    expected = tiny.logits()
    check_shared(tiny.model.double(), torch.float64)
    tiny.batch["x"] = tiny.batch["x"].double()
    torch.testing.assert_close(tiny.logits().float(), expected)
    check_shared(tiny.model.half(), torch.float16)
    meta = tiny.model.to("meta")
    assert {layer.projections.A.device.type for layer in layers_of(meta)} == {"meta"}
    assert len({id(layer.projections) for layer in layers_of(meta)}) == 1


def test_a_layer_moved_by_itself_leaves_the_others_working() -> None:
    tiny = adapted()
    expected = tiny.logits()
    layers_of(tiny.model)[0].double()
    assert layers_of(tiny.model)[1].projections.A.dtype == torch.float64
    x = torch.randn(2, 64)
    assert layers_of(tiny.model)[1](x).dtype == torch.float32
    tiny.model.float()
    assert torch.equal(tiny.logits(), expected)


def test_each_dtype_has_a_pair_of_its_own() -> None:
    model = Stack()
    model.blocks[1].double()
    inject(model, VeRAConfig(rank=4, targets=["0", "2"]))
    pairs = {id(layer.projections): layer.projections for layer in layers_of(model)}
    assert sorted(str(pair.A.dtype) for pair in pairs.values()) == [
        "torch.float32",
        "torch.float64",
    ]
    single, double = sorted(pairs.values(), key=lambda pair: str(pair.A.dtype))
    assert torch.equal(single.A.double(), double.A)


def test_a_state_dict_restores_the_function_of_the_same_configuration() -> None:
    tiny, other = adapted(), adapted(seed=2)
    assert not torch.equal(other.logits(), tiny.logits())
    other.model.load_state_dict(tiny.model.state_dict())
    assert torch.equal(other.logits(), tiny.logits())


def test_the_key_decides_and_the_global_generator_is_left_alone() -> None:
    first, second, other = (
        inject(build("stack").model, VeRAConfig(rank=2, targets=["0"], key=key))
        for key in (5, 5, 6)
    )
    A = [layers_of(model)[0].projections.A for model in (first, second, other)]
    assert torch.equal(A[0], A[1])
    assert not torch.equal(A[0], A[2])
    model, state = Stack(), torch.get_rng_state()
    inject(model, VeRAConfig(rank=2, targets=["0"]))
    assert torch.equal(torch.get_rng_state(), state)


# The configuration


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": 8.0}, TypeError, "rank must be an int, got 8.0"),
        ({"rank": True}, TypeError, "rank must be an int, got True"),
        ({"d_initial": 0}, ValueError, "d_initial must be finite and not 0 in float32, got 0"),
        ({"d_initial": math.nan}, ValueError, "d_initial must be finite .* got nan"),
        ({"d_initial": math.inf}, ValueError, "d_initial must be finite .* got inf"),
        ({"d_initial": 1e300}, ValueError, "d_initial must be finite and not 0 in float32"),
        ({"d_initial": 1e-60}, ValueError, "d_initial must be finite and not 0 in float32"),
        ({"d_initial": "0.1"}, TypeError, "d_initial must be a number, got '0.1'"),
        ({"key": 1.0}, TypeError, "key must be an int, got 1.0"),
        ({"key": False}, TypeError, "key must be an int, got False"),
        ({"key": 2**64}, ValueError, r"key must lie in \[-2\*\*63, 2\*\*64\), got 18446744073709"),
        ({"key": -(2**63) - 1}, ValueError, "key must lie in"),
        ({"save_projection": 1}, TypeError, "save_projection must be a bool, got 1"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"targets": []}, ValueError, "targets must name at least one module"),
        ({"exclude": "("}, ValueError, "exclude holds .* not a regular expression"),
        ({"trainable": [None]}, TypeError, "trainable must hold non-empty strings"),
    ],
)
def test_a_bad_option_is_named_with_its_value(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        VeRAConfig(**{**GOOD, **options})


@given(st.recursive(st.none() | st.floats() | st.integers() | st.text(), st.lists))
def test_any_value_of_any_option_is_accepted_or_refused_with_a_typed_error(value: object) -> None:
    for field in dataclasses.fields(VeRAConfig):
        with contextlib.suppress(TypeError, ValueError):
            VeRAConfig(**{**GOOD, field.name: value})


def test_the_configuration_is_a_value_with_the_defaults_of_peft() -> None:
    config = VeRAConfig(**GOOD)
    assert config == VeRAConfig(
        **GOOD, d_initial=0.1, key=0, save_projection=True, dropout=0.0, exclude=(), trainable=()
    )
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 2  # type: ignore[misc]
