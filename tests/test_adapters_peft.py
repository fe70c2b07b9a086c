"""The same files, first weights and losses as Hugging Face peft, which is the reference here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    LENGTH,
    NAMES,
    TRANSFORMERS,
    VOCABULARY,
    WIDTH,
    TinyModel,
    build,
    randomize_trainable,
)
from torch import Tensor, nn

from dynalora_adapters import LoRAConfig, LoRALinear, inject, load_adapter, save_adapter

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

CONFIG = "adapter_config.json"


def ours(name: str, **options: Any) -> TinyModel:
    tiny = build(name)
    options = {"rank": 4, "alpha": 8, "targets": tiny.targets, **options}
    inject(tiny.model, LoRAConfig(**{"trainable": tiny.trainable, **options}))
    return tiny


def theirs(name: str, **options: Any) -> TinyModel:
    tiny = build(name)
    options = {"r": 4, "lora_alpha": 8, "target_modules": tiny.targets, **options}
    config = peft.LoraConfig(**{"modules_to_save": tiny.trainable, **options})
    tiny.model = peft.get_peft_model(tiny.model, config)
    return tiny


def read_by_peft(name: str, folder: Path) -> TinyModel:
    tiny = build(name)
    tiny.model = peft.PeftModel.from_pretrained(tiny.model, folder).train()
    return tiny


def factors(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every layer, by the name of the layer in the base model."""
    found: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        if "lora_" in name:
            plain = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            found[plain] = param
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rslora", [True, False])
def test_peft_loads_what_we_save(name: str, rslora: bool, tmp_path: Path) -> None:
    tiny = ours(name, rslora=rslora, alpha_pattern={"0.*": 5})
    randomize_trainable(tiny.model)
    save_adapter(tiny.model, tmp_path)
    other = read_by_peft(name, tmp_path)
    torch.testing.assert_close(other.logits(), tiny.logits(), atol=1e-5, rtol=0)
    assert (tiny.logits() - build(name).logits()).abs().max() > 1e-2  # the adapter does matter
    other.model = other.model.merge_and_unload()
    torch.testing.assert_close(other.logits(), tiny.logits(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"0.*": 2}, "alpha_pattern": {r".*\.1\..*": 3}},
        {"target_modules": "all-linear"},
        {"init_lora_weights": "gaussian"},
        {"lora_dropout": 0.5, "exclude_modules": ["nothing.of.the.kind"]},
    ],
)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_we_load_what_peft_saves(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    tiny = theirs(name, **options)
    randomize_trainable(tiny.model)
    tiny.model.save_pretrained(tmp_path)
    other = build(name)
    load_adapter(other.model, tmp_path)
    tiny.model.eval()
    other.model.eval()
    torch.testing.assert_close(other.logits(), tiny.logits(), atol=1e-5, rtol=0)


def test_we_load_a_regular_expression_and_a_task_type(tmp_path: Path) -> None:
    tiny = theirs(
        "bert", target_modules=r".*\.(query|key)", modules_to_save=None, task_type="SEQ_CLS"
    )
    randomize_trainable(tiny.model)
    tiny.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["classifier", "score"]
    other = build("bert")
    load_adapter(other.model, tmp_path)
    torch.testing.assert_close(other.logits(), tiny.logits(), atol=1e-5, rtol=0)
    assert other.model.classifier.weight.requires_grad


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_we_refuse_what_peft_saves_and_we_cannot_compute(option: str, tmp_path: Path) -> None:
    theirs("bert", **{option: True}).model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{option}=True is not implemented here"):
        load_adapter(build("bert").model, tmp_path)


@pytest.mark.parametrize("name", [*TRANSFORMERS, "stack"])
def test_the_same_seed_gives_the_same_first_weights(name: str) -> None:
    targets = r"blocks\.\d\.[02]" if name == "stack" else "all-linear"
    torch.manual_seed(3)
    mine = factors(ours(name, targets=targets).model)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    reference = factors(theirs(name, target_modules=targets).model)
    assert torch.equal(state, torch.get_rng_state())
    assert mine.keys() == reference.keys()
    assert all(torch.equal(mine[key], reference[key]) for key in mine)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_training_follows_pefts(name: str, optimizer: Callable[..., Any]) -> None:
    losses = []
    for make in (ours, theirs):
        torch.manual_seed(3)
        tiny = make(name)
        steps = optimizer([p for p in tiny.model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(4):
            loss = tiny.loss()
            losses[-1].append(loss.item())
            steps.zero_grad()
            loss.backward()
            steps.step()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] - losses[0][-1] > 1e-3  # it did learn


def test_dropout_draws_what_pefts_draws(tmp_path: Path) -> None:
    tiny = ours("bert", dropout=0.5)
    randomize_trainable(tiny.model)
    save_adapter(tiny.model, tmp_path)
    other = read_by_peft("bert", tmp_path)
    logits = []
    for seed, model in ((7, tiny), (7, other), (8, tiny)):
        torch.manual_seed(seed)
        logits.append(model.logits())
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=0)
    assert not torch.equal(logits[0], logits[2])


def test_a_model_adapted_by_peft_is_not_adapted_again() -> None:
    tiny = theirs("bert")
    with pytest.raises(ValueError, match=r"adapted already by peft \(at .*query\); unload"):
        inject(tiny.model, LoRAConfig(rank=2, alpha=2, targets=["key"]))


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes = {"vocab_size": VOCABULARY, "dim": WIDTH, "hidden_dim": WIDTH, "n_layers": 2}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes, n_heads=4))


def gpt2_language_model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": WIDTH, "n_layer": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, n_head=4, bos_token_id=1, eos_token_id=1))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": WIDTH, "num_layers": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, num_heads=4, decoder_start_token_id=0))


def bert_for(task: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        config = build("bert").model.config
        config.num_labels = 2  # the start and the end of an answer
        return getattr(transformers, f"BertFor{task}")(config)

    return make


@pytest.mark.parametrize(
    ("make", "options", "task"),
    [
        (distilbert, {"targets": "all-linear", "trainable": ["classifier"]}, "SEQ_CLS"),
        (distilbert, {"targets": ["q_lin"]}, None),  # SEQ_CLS would need the head in the file
        (gpt2_language_model, {"targets": "all-linear"}, "CAUSAL_LM"),
        (gpt2_language_model, {"targets": ["c_fc"], "trainable": ["wte", "lm_head"]}, "CAUSAL_LM"),
        (t5, {"targets": ["q", "wo"]}, "SEQ_2_SEQ_LM"),
        (bert_for("TokenClassification"), {"targets": ["key"], "trainable": ["classifier"]},
         "TOKEN_CLS"),
        (bert_for("QuestionAnswering"), {"targets": ["dense"], "exclude": r".*\.0\..*",
         "trainable": ["qa_outputs"]}, "QUESTION_ANS"),
    ],
)  # fmt: skip
def test_every_task_round_trips_through_peft(
    make: Callable[[], nn.Module], options: dict[str, Any], task: str | None, tmp_path: Path
) -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    def logits(model: nn.Module) -> Tensor:
        batch = {"input_ids": torch.arange(1, 7).view(2, 3)}
        if task == "SEQ_2_SEQ_LM":
            batch["decoder_input_ids"] = batch["input_ids"]
        with torch.no_grad():
            return model(**batch)[0]

    model = inject(fresh(), LoRAConfig(rank=2, alpha=8, **options))
    randomize_trainable(model)
    save_adapter(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["task_type"] == task
    reference = peft.PeftModel.from_pretrained(fresh(), tmp_path / "ours")
    torch.testing.assert_close(logits(reference), logits(model), atol=1e-5, rtol=0)
    reference.save_pretrained(tmp_path / "theirs")
    back = load_adapter(fresh(), tmp_path / "theirs")
    torch.testing.assert_close(logits(back), logits(model), atol=1e-5, rtol=0)
    assert any(isinstance(module, LoRALinear) for module in back.modules())


def test_short_target_lists_stay_short_and_the_origin_is_noted(tmp_path: Path) -> None:
    tiny = ours("gpt2")
    tiny.model.config.name_or_path = "somewhere/gpt2"
    save_adapter(tiny.model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["c_attn"]
    assert config["fan_in_fan_out"] is True
    assert config["base_model_name_or_path"] == "somewhere/gpt2"
