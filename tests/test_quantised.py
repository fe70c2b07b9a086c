"""Quantised weights under adapters of ours and of peft: bitsandbytes' and torchao's, on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from causal_models import batch, build, step

from dynalora_adapters import (
    LoRAConfig,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
)
from dynalora_optim import Budget, DynamicAllocationOptimizer, LiveBytes
from dynalora_optim.integrations.transformers import chunk_loss

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 128}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def _replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module], head: bool) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and (head or name != "lm_head"):
            parent, _, leaf = name.rpartition(".")
            quantised = make(module)
            quantised.load_state_dict(module.state_dict())
            setattr(model.get_submodule(parent), leaf, quantised.to("cpu"))
    return model


def nf4(model: nn.Module, head: bool) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    return _replaced(
        model,
        lambda linear: bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.float32,
            quant_type="nf4",
        ),
        head,
    )


def int8(model: nn.Module, head: bool) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    return _replaced(
        model,
        lambda linear: bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
        ),
        head,
    )


def _by_torchao(model: nn.Module, config: Any, head: bool) -> nn.Module:
    from torchao.quantization import quantize_

    quantize_(model if head else model.model, config)
    return model


def torchao_int8(model: nn.Module, head: bool) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    return _by_torchao(model, torchao.Int8WeightOnlyConfig(), head)


def torchao_int4(model: nn.Module, head: bool) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    granularity = torchao.granularity.PerGroup(32)
    config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)
    return _by_torchao(model, config, head)


KINDS = {"nf4": nf4, "int8": int8, "torchao int8": torchao_int8, "torchao int4": torchao_int4}
every_kind = pytest.mark.parametrize("kind", KINDS)


def quantised(kind: str, *, head: bool = False) -> nn.Module:
    model = KINDS[kind](build(**SIZES), head)
    model.requires_grad_(False)
    return model.train()


def adapted(kind: str, by: str = "ours", *, head: bool = False) -> nn.Module:
    model = quantised(kind, head=head)
    torch.manual_seed(0)
    if by == "ours":
        inject(model, LoRAConfig(rank=4, alpha=8, targets=TARGETS))
    else:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def dense_twin(layer: nn.Module) -> Tensor:
    """The weight that a quantised layer multiplies with: its output for the identity."""
    with torch.no_grad():
        return layer(torch.eye(layer.in_features)).t()


@every_kind
def test_an_adapted_layer_is_its_dequantised_weight_plus_the_delta(kind):
    layer = adapted(kind).model.layers[0].mlp.down_proj
    weight = dense_twin(layer.base_layer)
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    ours = layer(x)
    theirs = x @ (weight + layer.lora_B @ layer.lora_A * layer.scaling).t()
    tolerance = {"rtol": 2e-2, "atol": 2e-1} if kind == "int8" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours, theirs, **tolerance)  # int8 rounds its input too
    g = torch.randn_like(ours)
    leaves = [x, layer.lora_A, layer.lora_B]
    for found, expected in zip(
        torch.autograd.grad(ours, leaves, g), torch.autograd.grad(theirs, leaves, g), strict=True
    ):
        torch.testing.assert_close(found, expected, **tolerance)


@every_kind
def test_ours_and_pefts_take_the_same_step(kind):
    ours, theirs = (step(adapted(kind, by), batch()) for by in ("ours", "peft"))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    renamed = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): gradient
        for name, gradient in theirs[1].items()
    }
    assert ours[1].keys() == renamed.keys()
    for name, gradient in renamed.items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-2, atol=1e-4)


@every_kind
@pytest.mark.parametrize("by", ["ours", "peft"])
def test_a_budget_holds_over_quantised_weights_which_stay_as_they_are(kind, by):
    model = adapted(kind, by)
    inputs = batch()
    before = {name: copy.deepcopy(value) for name, value in frozen(model).items()}
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    budget = Budget(memory=0.75)
    optimizer = DynamicAllocationOptimizer(inner, model, allocator=budget, period=1)
    model(**inputs)  # measures
    limit = 0.75 * optimizer.memory_report().all_active.peak
    for _ in range(5):
        predicted = optimizer.memory_report().current.peak
        with LiveBytes() as memory:
            model(**inputs).loss.backward()
        assert memory.peak <= limit
        assert memory.peak <= predicted
        optimizer.step()
        optimizer.zero_grad()
    assert len({entry.chosen for entry in optimizer.record}) > 1
    for name, value in frozen(model).items():
        assert repr(value) == repr(before[name]), name


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}


@every_kind
def test_the_loss_in_chunks_over_a_quantised_head(kind):
    model = adapted(kind, head=True)
    loss, gradients = step(model, batch())
    with chunk_loss(model, chunk=5):
        ours, found = step(model, batch())
    tolerance = 1e-2 if kind == "int8" else 1e-5  # int8's scales are those of the rows it gets
    torch.testing.assert_close(ours, loss, rtol=tolerance, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance)


@every_kind
def test_merging_is_refused_before_anything_changes(kind):
    model = adapted(kind)
    before = step(model, batch())[0]
    with pytest.raises(ValueError, match=r"cannot hold the delta; keep the adapter unmerged"):
        merge(model)
    assert torch.equal(step(model, batch())[0], before)


@every_kind
def test_an_adapter_is_saved_and_loaded(kind, tmp_path):
    model = adapted(kind)
    save_adapter(model, tmp_path / "adapter")
    fresh = load_adapter(quantised(kind), tmp_path / "adapter").train()
    torch.testing.assert_close(step(fresh, batch()), step(model, batch()))


def test_an_evaluation_does_not_stop_the_training():
    """On a CPU with AVX512-BF16, bitsandbytes repacks its weights in an evaluation."""
    model = adapted("nf4")
    expected = step(model, batch())
    model.eval()
    with torch.no_grad():
        model(**batch())
    model.train()
    torch.testing.assert_close(step(model, batch()), expected)


def test_a_model_that_has_been_evaluated_is_refused():
    model = quantised("nf4").eval()
    with torch.no_grad():
        model(**batch())
    layer = model.model.layers[0].mlp.down_proj
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16")
    with pytest.raises(ValueError, match="load the model again"):
        inject(model, LoRAConfig(rank=4, alpha=8, targets=TARGETS))


def test_removing_the_adapters_allows_repacking_again():
    model = adapted("nf4")
    layer = model.model.layers[0].self_attn.o_proj
    assert layer.support_avx512bf16_for_cpu is False
    fresh = quantised("nf4").model.layers[0].self_attn.o_proj.support_avx512bf16_for_cpu
    remove(model)
    assert layer.support_avx512bf16_for_cpu is fresh
