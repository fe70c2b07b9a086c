"""merge and unmerge: the same function in fewer operations, and back."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_models import NAMES, Stack, TinyModel, build, randomize_trainable, same, snapshot
from torch import nn

from dynalora_adapters import LoRAConfig, LoRALinear, VeRAConfig, inject, merge, remove, unmerge

BOTH = pytest.mark.parametrize("kind", ["lora", "vera"])


def adapted(name: str, dtype: torch.dtype = torch.float32, kind: str = "lora") -> TinyModel:
    tiny = build(name)
    tiny.model.to(dtype)
    for key, value in tiny.batch.items():
        tiny.batch[key] = value.to(dtype) if value.is_floating_point() else value
    where = {"targets": tiny.targets, "trainable": tiny.trainable}
    lora, vera = LoRAConfig(rank=4, alpha=8, **where), VeRAConfig(rank=4, **where)
    inject(tiny.model, lora if kind == "lora" else vera)
    randomize_trainable(tiny.model)
    return tiny


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_merged_and_unmerged_compute_the_same(name: str, kind: str) -> None:
    tiny = adapted(name, torch.float64, kind)
    expected, before = tiny.logits(), copy.deepcopy(tiny.model.state_dict())
    assert merge(tiny.model) is tiny.model
    torch.testing.assert_close(tiny.logits(), expected)
    assert unmerge(tiny.model) is tiny.model
    torch.testing.assert_close(dict(tiny.model.state_dict()), dict(before))
    torch.testing.assert_close(tiny.logits(), expected)


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_training_merging_and_removing_leaves_a_plain_model_with_the_trained_function(
    name: str, kind: str
) -> None:
    tiny = adapted(name, kind=kind)
    optimizer = torch.optim.SGD([p for p in tiny.model.parameters() if p.requires_grad], lr=0.1)
    first = tiny.loss().item()
    for _ in range(5):
        optimizer.zero_grad()
        tiny.loss().backward()
        optimizer.step()
    assert tiny.loss().item() < first
    expected, plain = tiny.logits(), build(name)
    remove(merge(tiny.model))
    assert [type(m) for m in tiny.model.modules()] == [type(m) for m in plain.model.modules()]
    torch.testing.assert_close(tiny.logits(), expected, atol=1e-5, rtol=1e-5)


def test_a_merged_layer_calls_its_base_only() -> None:
    tiny = adapted("stack")
    merge(tiny.model)
    for module in tiny.model.modules():
        if isinstance(module, LoRALinear):
            x = torch.randn(2, module.in_features)
            assert torch.equal(module(x), module.base_layer(x))
            assert "merged=True" in repr(module)


def test_merging_twice_and_unmerging_the_unmerged_change_nothing() -> None:
    tiny = adapted("gpt2")
    before = snapshot(tiny.model)
    unmerge(tiny.model)
    assert same(before, snapshot(tiny.model))
    merge(tiny.model)
    before = snapshot(tiny.model)
    merge(tiny.model)
    assert same(before, snapshot(tiny.model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_the_rounded_float32_sum(dtype: torch.dtype) -> None:
    base = nn.Linear(16, 8).to(dtype)
    model = nn.Sequential(base)
    inject(model, LoRAConfig(rank=2, alpha=4, targets=["0"]))
    randomize_trainable(model)
    start = base.weight.detach().clone()
    exact = start.float() + model[0].delta_weight()
    merge(model)
    assert base.weight.dtype == dtype
    assert torch.equal(base.weight, exact.to(dtype))
    unmerge(model)
    scale = torch.maximum(start.float().abs(), exact.abs()).max().item()
    assert (base.weight.float() - start.float()).abs().max() <= torch.finfo(dtype).eps * scale


def not_finite(model: Stack) -> None:
    model.blocks[1][2].lora_A.data[0, 0] = math.nan


def overflowing(model: Stack) -> None:
    model.half()
    model.blocks[1][2].lora_B.data.fill_(6e4)
    model.blocks[1][2].lora_A.data.fill_(6e4)


def shared(model: Stack) -> None:
    model.twin = nn.Linear(1, 1)
    model.twin.weight = model.blocks[1][2].base_layer.weight


def quantised(model: Stack) -> None:
    weight = model.blocks[1][2].base_layer.weight
    model.blocks[1][2].base_layer.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)


def packed(model: Stack) -> None:
    weight = model.blocks[1][2].base_layer.weight
    model.blocks[1][2].base_layer.weight = nn.Parameter(weight.reshape(-1, 1))


def parametrized(model: Stack) -> None:
    nn.utils.parametrizations.weight_norm(model.blocks[1][2].base_layer)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (not_finite, "would get a delta from adapter weights that hold inf or nan"),
        (overflowing, "would hold inf or nan in torch.float16"),
        (shared, "is shared .*twin.weight"),
        (quantised, "is torch.int8, which cannot hold the delta"),
        (packed, r"is packed in the shape \(2048, 1\)"),
        (parametrized, "is not a parameter of its own"),
    ],
)
def test_weights_that_cannot_take_the_delta_raise_before_anything_changes(
    spoil: object, reason: str
) -> None:
    tiny = adapted("stack")
    spoil(tiny.model)  # type: ignore[operator]
    finite = [n for n, p in tiny.model.named_parameters() if p.isfinite().all()]
    before = {n: p.clone() for n, p in tiny.model.named_parameters()}
    with pytest.raises(ValueError, match=rf"weight of blocks\.1\.2 {reason}.*keep the adapter"):
        merge(tiny.model)
    assert not any(m.merged for m in tiny.model.modules() if isinstance(m, LoRALinear))
    assert all(torch.equal(before[n], p) for n, p in tiny.model.named_parameters() if n in finite)


def test_adapters_added_to_a_merged_away_model_start_from_its_function() -> None:
    tiny = adapted("stack")
    remove(merge(tiny.model))
    expected = tiny.logits()
    inject(tiny.model, LoRAConfig(rank=2, alpha=2, targets=tiny.targets))
    assert torch.equal(tiny.logits(), expected)
