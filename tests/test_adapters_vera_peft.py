"""VeRA beside Hugging Face peft, the reference: the same projections, files and losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import NAMES, TRANSFORMERS, TinyModel, build, randomize_trainable
from torch import nn

from dynalora_adapters import VeRAConfig, VeRALinear, inject, load_adapter, merge, save_adapter

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings(
    "ignore:Specified to not:UserWarning", "ignore:fan_in_fan_out:UserWarning"
)


def ours(name: str, **options: Any) -> TinyModel:
    tiny = build(name)
    options = {"rank": 5, "key": 3, "targets": tiny.targets, **options}
    inject(tiny.model, VeRAConfig(**{"trainable": tiny.trainable, **options}))
    return tiny


def theirs(name: str, **options: Any) -> TinyModel:
    tiny = build(name)
    options = {"r": 5, "projection_prng_key": 3, "target_modules": tiny.targets, **options}
    config = peft.VeraConfig(**{"modules_to_save": tiny.trainable, **options})
    tiny.model = peft.get_peft_model(tiny.model, config)
    return tiny


def shared(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    layer = next(m for m in model.modules() if isinstance(m, VeRALinear))
    return layer.projections.A, layer.projections.B


@pytest.mark.parametrize("key", [0, 3, -1, 2**31, 2**64 - 1])
@pytest.mark.parametrize(
    ("name", "rank", "targets"),
    [
        ("bert", 1, ["query", "value"]),
        ("bert", 16, "all-linear"),
        ("llama", 5, ["q_proj", "v_proj", "down_proj"]),
        ("gpt2", 7, ["c_attn", "c_proj"]),
        ("stack", 300, r"blocks\.\d\.[02]"),
    ],
)
def test_projections_are_pefts_bit_for_bit(name: str, rank: int, targets: Any, key: int) -> None:
    mine = ours(name, rank=rank, targets=targets, key=key).model
    reference = theirs(name, r=rank, target_modules=targets, projection_prng_key=key).model
    A, B = shared(mine)
    assert torch.equal(A, reference.base_model.vera_A["default"])
    assert torch.equal(B, reference.base_model.vera_B["default"])


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_peft_loads_what_we_save(name: str, save_projection: bool, tmp_path: Path) -> None:
    tiny = ours(name, save_projection=save_projection)
    randomize_trainable(tiny.model, scale=0.5)
    save_adapter(tiny.model, tmp_path)
    other = build(name)
    assert (tiny.logits() - other.logits()).abs().max() > 1e-2  # the adapter does matter
    other.model = peft.PeftModel.from_pretrained(other.model, tmp_path).train()
    torch.testing.assert_close(other.logits(), tiny.logits(), atol=1e-5, rtol=0)
    other.model.merge_adapter()
    torch.testing.assert_close(other.logits(), tiny.logits(), atol=1e-5, rtol=1e-5)
    merge(tiny.model)
    torch.testing.assert_close(other.logits(), tiny.logits(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"save_projection": False},
        {"target_modules": "all-linear", "d_initial": 0.5},
        {"vera_dropout": 0.5, "save_projection": False, "init_weights": False},
    ],
)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_we_load_what_peft_saves(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    tiny = theirs(name, **options)
    randomize_trainable(tiny.model, scale=0.5)
    tiny.model.save_pretrained(tmp_path)
    other = build(name)
    load_adapter(other.model, tmp_path)
    tiny.model.eval()
    other.model.eval()
    torch.testing.assert_close(other.logits(), tiny.logits(), atol=1e-5, rtol=1e-5)


def test_we_load_a_regular_expression_and_a_task_type(tmp_path: Path) -> None:
    tiny = theirs(
        "bert", target_modules=r".*\.(query|key)", modules_to_save=None, task_type="SEQ_CLS"
    )
    randomize_trainable(tiny.model, scale=0.5)
    tiny.model.save_pretrained(tmp_path)
    other = build("bert")
    load_adapter(other.model, tmp_path)
    torch.testing.assert_close(other.logits(), tiny.logits(), atol=1e-5, rtol=0)
    save_adapter(other.model, tmp_path / "ours")
    assert (
        json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == "VERA"
    )


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_training_follows_pefts(name: str) -> None:
    losses: list[list[float]] = []
    for make in (ours, theirs):
        tiny = make(name)
        optimizer = torch.optim.AdamW([p for p in tiny.model.parameters() if p.requires_grad], 1e-2)
        losses.append([])
        for _ in range(5):
            loss = tiny.loss()
            losses[-1].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][0] - losses[0][-1] > 1e-3  # it did learn


def test_dropout_draws_what_pefts_draws(tmp_path: Path) -> None:
    tiny = ours("bert", dropout=0.5)
    randomize_trainable(tiny.model, scale=0.5)
    save_adapter(tiny.model, tmp_path)
    other = build("bert")
    other.model = peft.PeftModel.from_pretrained(other.model, tmp_path).train()
    logits = []
    for seed, model in ((7, tiny), (7, other), (8, tiny)):
        torch.manual_seed(seed)
        logits.append(model.logits())
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=0)
    assert not torch.equal(logits[0], logits[2])


def test_an_exclusion_is_spelled_out_because_pefts_vera_knows_none(tmp_path: Path) -> None:
    tiny = ours("bert", exclude=["layer.1.attention.self.query"])
    adapted = {n for n, m in tiny.model.named_modules() if isinstance(m, VeRALinear)}
    assert len(adapted) == 3
    save_adapter(tiny.model, tmp_path)
    assert "exclude_modules" not in json.loads((tmp_path / "adapter_config.json").read_text())
    loaded = peft.PeftModel.from_pretrained(build("bert").model, tmp_path)
    kinds = {n: type(m).__module__ for n, m in loaded.base_model.model.named_modules()}
    assert {n for n, kind in kinds.items() if kind == "peft.tuners.vera.layer"} == adapted
