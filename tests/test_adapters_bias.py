"""Biases that train beside the adapters: which ones, in the file, in peft, and in the optimizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyModel, build, randomize_trainable, same, snapshot
from torch import nn

from dynalora_adapters import (
    LoRAConfig,
    VeRAConfig,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
)
from dynalora_optim import Budget, DynamicAllocationOptimizer


def lora(tiny: TinyModel, **options: Any) -> LoRAConfig:
    return LoRAConfig(rank=2, alpha=4, targets=tiny.targets, trainable=tiny.trainable, **options)


def vera(tiny: TinyModel, **options: Any) -> VeRAConfig:
    return VeRAConfig(rank=4, targets=tiny.targets, trainable=tiny.trainable, **options)


def adapted(name: str, bias: str, make: Callable[..., Any] = lora) -> TinyModel:
    tiny = build(name)
    inject(tiny.model, make(tiny, bias=bias))
    return tiny


def trained(tiny: TinyModel) -> set[str]:
    """The biases that train, without those of the head."""
    return {
        name.replace(".base_layer", "")
        for name, param in tiny.model.named_parameters()
        if name.endswith(".bias") and param.requires_grad and "classifier" not in name
    }


def test_the_option_says_which_biases_train() -> None:
    biases = {n for n, _ in build("bert").model.named_parameters() if n.endswith(".bias")}
    biases.remove("classifier.bias")
    assert trained(adapted("bert", "none")) == set()
    assert trained(adapted("bert", "adapted")) == {
        name for name in biases if name.split(".")[-2] in ("query", "value")
    }
    assert trained(adapted("bert", "all")) == biases
    assert torch.equal(adapted("bert", "all").logits(), build("bert").logits())


@pytest.mark.parametrize("make", [lora, vera])
@pytest.mark.parametrize("bias", ["adapted", "all"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_they_are_saved_and_loaded_here_and_by_peft(
    name: str, bias: str, make: Callable[..., Any], tmp_path: Path
) -> None:
    tiny = adapted(name, bias, make)
    randomize_trainable(tiny.model)
    save_adapter(tiny.model, tmp_path)
    into = [build(name), adapted(name, bias, make)]
    for other in into:
        load_adapter(other.model, tmp_path)
        assert trained(other) == trained(tiny)
        torch.testing.assert_close(other.logits(), tiny.logits(), atol=0, rtol=0)
    peft = pytest.importorskip("peft")
    other = build(name)
    other.model = peft.PeftModel.from_pretrained(other.model, tmp_path).train()
    torch.testing.assert_close(other.logits(), tiny.logits(), atol=1e-5, rtol=0)
    merge(tiny.model, remove=True)
    torch.testing.assert_close(tiny.logits(), other.logits(), atol=1e-5, rtol=0)


def test_after_remove_they_are_as_trainable_as_before() -> None:
    tiny = build("bert")
    tiny.model.bert.encoder.requires_grad_(False)
    before = {name: param.requires_grad for name, param in tiny.model.named_parameters()}
    inject(tiny.model, lora(tiny, bias="all"))
    remove(tiny.model)
    assert before == {name: param.requires_grad for name, param in tiny.model.named_parameters()}


def forget(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}))


@pytest.mark.parametrize(
    ("bias", "spoil", "into", "message"),
    [
        ("adapted", forget, "bare", "unexpected base_model.model.*query.base_layer.bias"),
        ("adapted", lambda _: None, "all", "missing base_model.model.bert.embeddings.LayerNorm"),
        ("all", lambda _: None, "adapted", "unexpected base_model.model.bert.embeddings.LayerNorm"),
    ],
)
def test_a_file_with_other_biases_is_refused_before_the_model_changes(
    bias: str, spoil: Callable[[Path], None], into: str, message: str, tmp_path: Path
) -> None:
    save_adapter(adapted("bert", bias).model, tmp_path)
    spoil(tmp_path)
    model = build("bert").model if into == "bare" else adapted("bert", into).model
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("allocator", [None, Budget(0.8)])
def test_they_train_in_every_step_also_beside_inactive_adapters(allocator: Any) -> None:
    tiny = adapted("bert", "all")
    options = {"active": 1} if allocator is None else {"allocator": allocator}
    optimizer = DynamicAllocationOptimizer(
        torch.optim.SGD(tiny.model.parameters(), lr=0.1), tiny.model, period=1, **options
    )
    for _ in range(3):
        before = {n: p.detach().clone() for n, p in tiny.model.named_parameters()}
        tiny.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {
            n.replace(".base_layer", "")
            for n, p in tiny.model.named_parameters()
            if not torch.equal(p, before[n])
        }
        still = {name for name in trained(tiny) if name not in moved}
        assert all(".key." in name for name in still), "softmax takes the key's bias away"
    optimizer.close()


def test_a_bias_that_is_a_parameter_of_the_model_itself_trains_too(tmp_path: Path) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.bias = nn.Parameter(torch.zeros(2))

    config = LoRAConfig(rank=1, alpha=1, targets=["linear"], bias="all")
    model = inject(Shifted(), config)
    assert model.bias.requires_grad
    randomize_trainable(model)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(Shifted(), tmp_path).bias, model.bias)
