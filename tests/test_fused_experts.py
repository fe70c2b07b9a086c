"""Experts fused in one parameter: peft adapts them, and the optimizer drives its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import check_runs, clear, gradients, measured
from tiny_models import TinyModel, randomize_trainable, same, snapshot
from torch import nn
from torch.optim import AdamW
from toy import same as same_weights
from toy import weights

from dynalora_adapters import LoRAConfig, inject, load_adapter
from dynalora_optim import Budget, DynamicAllocationOptimizer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 3}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 3, "moe_intermediate_size": 12}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 3}),  # weights the other way round, biases
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EACH = pytest.mark.parametrize("kind", KINDS)


def build(kind: str) -> nn.Module:
    name, own = KINDS[kind]
    config = getattr(transformers, name)(**SIZES, **own)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    model.set_experts_implementation("eager")  # the others need a newer torch on a CPU
    return model.train()


def adapted(kind: str) -> TinyModel:
    """A model whose experts and queries peft has adapted."""
    torch.manual_seed(1)
    model = peft.get_peft_model(
        build(kind), peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS)
    )
    randomize_trainable(model)
    ids = torch.randint(64, (4, 12))
    return TinyModel(kind, model, {"input_ids": ids, "labels": ids}, [], [])


def owner(parameter: str, groups: list[str]) -> str | None:
    """The group of a parameter: of nested layers, the one that holds it itself."""
    return next((g for g in groups if parameter.startswith(f"{g}.lora_")), None)


@EACH
def test_each_of_pefts_layers_is_a_group_that_trains_as_if_all_did(kind: str) -> None:
    tiny, all_active = adapted(kind), adapted(kind)
    inner = AdamW(tiny.model.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer = DynamicAllocationOptimizer(
        inner, tiny.model, active=2, period=1, allocator="round_robin"
    )
    assert len(optimizer.groups) == 9  # in each block: queries, and two parameters of the experts
    for _ in range(6):
        all_active.model.load_state_dict(tiny.model.state_dict())
        clear(all_active)
        loss, wanted = all_active.loss(), weights(tiny.model)
        assert torch.equal(tiny.loss(), loss)
        loss.backward()
        before, active = wanted, set(optimizer.active_groups)
        tiny.loss().backward()
        found, every = gradients(tiny), gradients(all_active)
        assert {owner(name, optimizer.groups) for name in found} == active
        assert found.keys() == {n for n in every if owner(n, optimizer.groups) in active}
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, every[name])
        optimizer.step()
        optimizer.zero_grad()
        moved = {n for n, old in before.items() if not torch.equal(old, weights(tiny.model)[n])}
        assert {owner(name, optimizer.groups) for name in moved} == active


@EACH
def test_with_all_active_it_is_the_plain_optimizer(kind: str) -> None:
    plain, tiny = adapted(kind), adapted(kind)
    one = AdamW(plain.model.parameters(), lr=1e-2, weight_decay=0.1)
    other: Any = AdamW(tiny.model.parameters(), lr=1e-2, weight_decay=0.1)
    other = DynamicAllocationOptimizer(other, tiny.model, active=1.0, period=2)
    for _ in range(4):
        for model, optimizer in ((plain, one), (tiny, other)):
            model.loss().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same_weights(weights(plain.model), weights(tiny.model))


@pytest.mark.parametrize(
    "kind",
    ["mixtral", *(pytest.param(k, marks=pytest.mark.slow) for k in ("qwen3_moe", "gpt_oss"))],
)
def test_no_step_exceeds_a_budget(kind: str) -> None:
    tiny = adapted(kind)
    all_active, _ = measured(tiny.loss)
    check_runs(tiny, Budget(memory=int(0.8 * all_active)), steps=3)


@EACH
def test_what_was_trained_loads_in_peft(kind: str, tmp_path: Path) -> None:
    tiny = adapted(kind)
    inner = AdamW(tiny.model.parameters(), lr=1e-2)
    optimizer = DynamicAllocationOptimizer(inner, tiny.model, active=3, period=1)
    for _ in range(3):
        tiny.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    tiny.model.save_pretrained(tmp_path)
    again = TinyModel(
        kind, peft.PeftModel.from_pretrained(build(kind), tmp_path), tiny.batch, [], []
    )
    torch.testing.assert_close(again.logits(), tiny.logits())


def test_a_file_of_adapted_parameters_is_refused_with_the_way(tmp_path: Path) -> None:
    adapted("mixtral").model.save_pretrained(tmp_path)
    model = build("mixtral")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"target_parameters=.*PeftModel.*drives peft's layers"):
        load_adapter(model, tmp_path)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj", "gate.weight"])
def test_a_target_that_is_a_parameter_is_refused_with_the_way(target: str) -> None:
    model = build("mixtral")
    before = snapshot(model)
    leaf = target.rpartition(".")[2]
    match = rf"parameter .*mlp\..*{leaf}, not a module.*target_parameters=\['{leaf}'\]"
    with pytest.raises(ValueError, match=match):
        inject(model, LoRAConfig(rank=2, alpha=2, targets=["q_proj", target]))
    assert same(before, snapshot(model))
