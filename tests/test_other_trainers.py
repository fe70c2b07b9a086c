"""Trainers of others, with the real packages: with all modules active as the plain optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_chunk_loss_trainers import arguments, tokenizer
from toy import same, weights

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

from causal_models import VOCABULARY, build  # noqa: E402

from dynalora_adapters import LoRAConfig, inject  # noqa: E402
from dynalora_optim import Backward, Budget, DynamicAllocationOptimizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
ACTIVE: dict[str, Any] = {"active": 1.0}
Make = Callable[[torch.nn.Module, type[torch.optim.Optimizer]], Any]


def by(options: dict[str, Any] | None) -> Make:
    """How an optimizer is built: plainly, or wrapped with ``options``."""

    def make(model: torch.nn.Module, rule: type[torch.optim.Optimizer] = torch.optim.AdamW) -> Any:
        inner = rule([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return inner if options is None else DynamicAllocationOptimizer(inner, model, **options)

    return make


def adapted(model: Any, how: str) -> Any:
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "down_proj"]
    if how == "ours":
        return inject(model, LoRAConfig(rank=2, alpha=4, targets=targets))
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    )


def words(seed: int, count: int) -> str:
    ids = torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{int(i)}" for i in ids)


def texts(*columns: str, rows: int = 12) -> Any:
    return datasets.Dataset.from_list(
        [{c: words(10 * row + i, 5 + i) for i, c in enumerate(columns)} for row in range(rows)]
    )


# TRL


def of_sft(folder: Path, make: Make, how: str) -> tuple[dict[str, Any], Any]:
    trl = pytest.importorskip("trl")
    model = adapted(build(num_hidden_layers=4), how)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments(folder, eval_strategy="no")),
        train_dataset=texts("text"),
        processing_class=tokenizer(),
        optimizers=(make(model), None),
    )
    trainer.train()
    return weights(model), trainer.optimizer.optimizer


def of_dpo(folder: Path, make: Make, how: str) -> tuple[dict[str, Any], Any]:
    """Its model has one adapter of ours, or one of peft's, beside which TRL adds another."""
    trl = pytest.importorskip("trl")
    model = adapted(build(num_hidden_layers=4), how)
    optimizer = make(model)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=build(num_hidden_layers=4) if how == "ours" else None,
        args=trl.DPOConfig(**arguments(folder, eval_strategy="no")),
        train_dataset=texts("prompt", "chosen", "rejected"),
        processing_class=tokenizer(),
        optimizers=(optimizer, None),
    )
    trainer.train()
    return weights(model), trainer.optimizer.optimizer


RUNS = {
    "SFT, ours": (of_sft, "ours"),
    "SFT, peft": pytest.param(of_sft, "peft", marks=pytest.mark.slow),
    "DPO, ours": pytest.param(of_dpo, "ours", marks=pytest.mark.slow),
    "DPO, peft": (of_dpo, "peft"),
}


@pytest.mark.parametrize(("train", "how"), RUNS.values(), ids=RUNS)
def test_trl_trains_as_with_the_plain_optimizer_and_on_a_budget(train, how, tmp_path):
    expected, _ = train(tmp_path, by(None), how)
    found, _ = train(tmp_path, by(ACTIVE), how)
    assert same(found, expected)
    budget = {"period": 1, "allocator": Budget(memory=1.0, compute=0.8)}
    moved, optimizer = train(tmp_path, by(budget), how)
    assert not same(moved, expected)
    assert all(value.isfinite().all() for value in moved.values())
    assert len({entry.chosen for entry in optimizer.record}) > 1


# sentence-transformers


def encoder(folder: Path) -> Any:
    package = pytest.importorskip("sentence_transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    return package.SentenceTransformer(str(folder / "bert"), device="cpu")


def of_sentences(folder: Path, make: Make, how: str) -> tuple[dict[str, Any], Any]:
    """The loss calls the model once for each column, before one backward pass."""
    package = pytest.importorskip("sentence_transformers")
    from sentence_transformers import losses

    model = encoder(folder)
    torch.manual_seed(0)
    inject(model, LoRAConfig(rank=2, alpha=4, targets=["query", "value", "intermediate.dense"]))
    options = arguments(folder, eval_strategy="no", per_device_train_batch_size=4)
    trainer = package.SentenceTransformerTrainer(
        model=model,
        args=package.SentenceTransformerTrainingArguments(**options),
        train_dataset=texts("anchor", "positive", "negative", rows=24),
        loss=losses.MultipleNegativesRankingLoss(model),
        optimizers=(make(model), None),
    )
    trainer.train()
    return weights(model), trainer.optimizer.optimizer


def test_sentence_transformers_trains_as_with_the_plain_optimizer_and_on_a_budget(tmp_path):
    expected, _ = of_sentences(tmp_path, by(None), "ours")
    found, _ = of_sentences(tmp_path, by(ACTIVE), "ours")
    assert same(found, expected)
    budget = {"period": 1, "allocator": Budget(memory=1.0, compute=0.8)}
    moved, optimizer = of_sentences(tmp_path, by(budget), "ours")
    assert not same(moved, expected)
    assert len({entry.chosen for entry in optimizer.record}) > 1


# Updates within the backward pass


def of_trainer(folder: Path, make: Make) -> dict[str, Any]:
    model = build(num_hidden_layers=3)
    rows = [{k: torch.arange(5) % 7 + i for k in ("input_ids", "labels")} for i in range(12)]
    args = arguments(
        folder, eval_strategy="no", gradient_accumulation_steps=1, max_grad_norm=0.0, max_steps=5
    )
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**args),
        train_dataset=rows,
        optimizers=(make(model, torch.optim.AdamW), None),
    )
    trainer.train()
    return weights(model)


def test_the_trainer_with_fused_updates_is_the_trainer_without(tmp_path):
    blocks = {"groups": "blocks", "period": 2}
    fused = {**blocks, "backward": Backward(fused=True)}
    assert same(of_trainer(tmp_path, by(None)), of_trainer(tmp_path, by({**fused, **ACTIVE})))
    some = {"active": 1, "allocator": "round_robin"}
    found = of_trainer(tmp_path, by({**fused, **some}))
    assert same(of_trainer(tmp_path, by({**blocks, **some})), found)
