"""transformers' Trainer: the factory is the loop written out, it resumes, and the callback reports.

Every comparison of weights is bit for bit.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import Sizes, build
from toy import same, weights

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dynalora_adapters import LoRAConfig, inject  # noqa: E402
from dynalora_optim import Budget, DynamicAllocationOptimizer  # noqa: E402
from dynalora_optim.integrations.transformers import (  # noqa: E402
    AllocationCallback,
    OptimizerFactory,
    dynalora_optimizer,
)

# transformers 5.0 knows optimizer classes only.
HAS_FACTORIES = "factory" in inspect.getsource(transformers.Trainer.create_optimizer)
needs_factories = pytest.mark.skipif(not HAS_FACTORIES, reason="this Trainer hands over no model")
LR, DECAY, MAX_NORM, STEPS, SAVED = 1e-2, 0.1, 0.3, 8, 4
MID_PERIOD = {"active": 3, "period": 3}  # SAVED lies within a period


@dataclass
class Run:
    """One training and what it left."""

    weights: dict[str, torch.Tensor]
    optimizer: DynamicAllocationOptimizer
    trainer: Any = None
    batches: list[dict[str, torch.Tensor]] = field(default_factory=list)

    @property
    def record(self):
        return self.optimizer.record.state_dict()


def adapted(name: str = "bert", *, by_peft: bool = False):
    tiny = build(name, sizes=Sizes(blocks=4))
    torch.manual_seed(0)
    # BERT's forward takes any keyword, so that the Trainer would leave dividing by the number of
    # micro-batches to its loss, which does not.
    tiny.model.accepts_loss_kwargs = False
    if by_peft:
        peft = pytest.importorskip("peft")
        theirs = peft.LoraConfig(
            r=4, target_modules=tiny.targets, modules_to_save=tiny.trainable, task_type="SEQ_CLS"
        )
        return replace(tiny, model=peft.get_peft_model(tiny.model, theirs))
    config = LoRAConfig(rank=4, alpha=8, targets=tiny.targets, trainable=tiny.trainable)
    inject(tiny.model, config)
    return tiny


def arguments(folder: Path, **options):
    common = {
        "max_steps": STEPS,
        "save_steps": SAVED,
        "per_device_train_batch_size": 2,
        "learning_rate": LR,
        "weight_decay": DECAY,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "max_grad_norm": MAX_NORM,
        "logging_steps": 2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **{**common, **options})


def decay_groups(model):
    """Weights decay, biases do not."""
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in trainable if "bias" not in n], "weight_decay": DECAY},
        {"params": [p for n, p in trainable if "bias" in n], "weight_decay": 0.0},
    ]


def by_hand(model, allocation):
    inner = torch.optim.AdamW(decay_groups(model), lr=LR, fused=True)
    return DynamicAllocationOptimizer(inner, model, **allocation)


def by_trainer(
    folder: Path,
    allocation: dict[str, Any],
    *,
    name: str = "bert",
    by_peft: bool = False,
    factory: bool = HAS_FACTORIES,
    resume: Path | None = None,
    prepare: Callable[[torch.nn.Module], None] = lambda model: None,
    callbacks: list[Any] | None = None,
    **options,
) -> Run:
    tiny = adapted(name, by_peft=by_peft)
    prepare(tiny.model)
    rows = [{key: value[i] for key, value in tiny.batch.items()} for i in range(4)]
    args, batches = arguments(folder, **options), []

    def collate(rows):
        batches.append({key: torch.stack([row[key] for row in rows]) for key in rows[0]})
        return dict(batches[-1])

    if factory:
        how = {"optimizer_cls_and_kwargs": dynalora_optimizer(args, **allocation)}
    else:
        how = {"optimizers": (by_hand(tiny.model, allocation), None)}
    trainer = transformers.Trainer(
        tiny.model, args, collate, rows * 8, callbacks=callbacks, eval_dataset=rows, **how
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return Run(weights(tiny.model), trainer.optimizer.optimizer, trainer, batches)


def by_loop(
    allocation, batches, *, accumulate: int = 1, bf16: bool = False, divided_again: int = 1
) -> Run:
    """What the Trainer does, written out."""
    model = adapted().model
    optimizer = by_hand(model, allocation)
    scheduler = transformers.get_scheduler("cosine", optimizer, 2, STEPS)
    model.train()
    for micro, batch in enumerate(batches[: STEPS * accumulate], start=1):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        (loss / accumulate / divided_again).backward()
        if micro % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return Run(weights(model), optimizer)


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of rows of different lengths; several rows get two tokens more than the longest."""
    length = max(len(row["input_ids"]) for row in rows) + 2 * (len(rows) > 1)
    batch = {"labels": torch.stack([row["labels"] for row in rows])}
    for key in ("input_ids", "attention_mask"):
        batch[key] = torch.zeros(len(rows), length, dtype=torch.long)
        for line, row in zip(batch[key], rows, strict=True):
            line[: len(row["input_ids"])] = row["input_ids"] if key == "input_ids" else 1
    return batch


def test_scores_of_padded_batches_are_those_of_the_rows_without_padding(tmp_path):
    def run(**options):
        tiny = adapted()
        generator = torch.Generator().manual_seed(0)
        rows = [
            {
                "input_ids": torch.randint(1, 60, (3 + i % 5,), generator=generator),
                "labels": torch.tensor(i % 3),
            }
            for i in range(16)
        ]
        optimizer = by_hand(tiny.model, {"active": 2, "period": 2, "allocator": "topk"})
        args = arguments(tmp_path, learning_rate=1e-3, max_steps=4, save_strategy="no", **options)
        trainer = transformers.Trainer(tiny.model, args, padded, rows, optimizers=(optimizer, None))
        trainer.train()
        return optimizer

    batches = run(per_device_train_batch_size=4)
    alone = run(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert [e.step for e in batches.record] == [e.step for e in alone.record] == [0, 2, 4]
    for entry, other in zip(batches.record, alone.record, strict=True):
        assert entry.chosen == other.chosen
        assert entry.scores == pytest.approx(other.scores, rel=1e-4)
    assert min(batches.record[-1].scores.values()) > 0


@needs_factories
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_factory_is_a_given_optimizer_and_the_loop_written_out(accumulate, bf16, tmp_path):
    options = {"gradient_accumulation_steps": accumulate, "bf16": bf16, "save_strategy": "no"}
    found = by_trainer(tmp_path, MID_PERIOD, **options)
    given = by_trainer(tmp_path, MID_PERIOD, factory=False, **options)
    # transformers 5.4 lets accelerate divide once more what it has divided itself.
    again = found.trainer.accelerator.gradient_accumulation_steps
    expected = by_loop(
        MID_PERIOD, found.batches, accumulate=accumulate, bf16=bf16, divided_again=again
    )
    assert same(found.weights, given.weights)
    assert same(found.weights, expected.weights)
    assert found.record == given.record == expected.record
    assert [entry.step for entry in found.optimizer.record] == [0, 3, 6], "optimizer steps"
    assert not same(found.weights, weights(adapted().model))


@pytest.mark.parametrize(
    ("importance", "lr_time", "allocator", "how"),
    [
        ("forward", "global", "discounted", {"factory": False}),
        ("gradient", "local", "discounted", {}),
        ("forward", "local", "budget", {}),
        ("gradient", "global", "discounted", {"by_peft": True}),
        ("forward", "local", "budget", {"by_peft": True}),
    ],
    ids=["given", "gradient", "budget", "peft", "peft, budget"],
)
def test_a_checkpoint_in_mid_period_goes_on_bit_for_bit(
    importance, lr_time, allocator, how, tmp_path
):
    allocation = {**MID_PERIOD, "importance": importance, "lr_time": lr_time}
    if allocator == "budget":
        allocation["allocator"] = Budget(memory=0.95, compute=0.9)
        del allocation["active"]
    expected = by_trainer(tmp_path / "straight", allocation, **how)
    saved = tmp_path / "straight" / f"checkpoint-{SAVED}"
    found = by_trainer(tmp_path / "again", allocation, resume=saved, **how)
    assert found.trainer.state.global_step == STEPS
    assert same(found.weights, expected.weights)
    assert found.record == expected.record
    first = [0, 1] if allocator == "budget" else [0]  # whose first step shows how the loop works
    assert [entry.step for entry in found.optimizer.record] == [*first, 3, 6]
    assert found.optimizer.tracker.scores() == expected.optimizer.tracker.scores()
    assert found.optimizer.learning_rates() == expected.optimizer.learning_rates()


@pytest.mark.parametrize("by_peft", [False, True], ids=["ours", "peft"])
def test_evaluations_disturb_nothing_and_the_best_model_is_loaded(by_peft, tmp_path):
    options = {"bf16": True, "gradient_accumulation_steps": 2, "by_peft": by_peft}
    evaluated = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # so that the best is not the last
    }
    plain = by_trainer(tmp_path / "plain", MID_PERIOD, **options)
    expected = by_trainer(tmp_path / "straight", MID_PERIOD, **options, **evaluated)
    assert expected.record == plain.record
    last = f"checkpoint-{STEPS}"
    file = "adapter_model.safetensors" if by_peft else "model.safetensors"
    trained = load_file(tmp_path / "straight" / last / file)
    assert same(trained, load_file(tmp_path / "plain" / last / file))

    best = Path(expected.trainer.state.best_model_checkpoint)
    assert best.name != last
    expected.trainer.save_model(str(tmp_path / "loaded"))
    assert same(load_file(tmp_path / "loaded" / file), load_file(best / file))

    saved = tmp_path / "straight" / f"checkpoint-{SAVED}"
    found = by_trainer(tmp_path / "again", MID_PERIOD, resume=saved, **options, **evaluated)
    assert same(load_file(tmp_path / "again" / last / file), trained)
    assert same(found.weights, expected.weights)
    assert found.record == expected.record


@pytest.mark.parametrize("allocator", ["discounted", "budget"])
def test_gradient_checkpointing_changes_nothing_and_goes_on(allocator, tmp_path, caplog):
    allocation = dict(MID_PERIOD)
    if allocator == "budget":
        allocation = {"period": 3, "allocator": Budget(memory=0.95, compute=0.9)}
    options = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        # As peft does where a model is checkpointed, and newer versions of transformers.
        "prepare": lambda model: model.enable_input_require_grads(),
    }

    def run(folder, **more):
        return by_trainer(tmp_path / folder, allocation, name="llama", **more)

    caplog.set_level(logging.WARNING, logger="dynalora_optim")
    expected = run("checkpointed", **options)
    assert "requires a gradient that nothing uses" in caplog.text
    layers = expected.trainer.model.model.layers
    if allocator == "discounted":  # a budget decides itself what is recomputed
        assert all(layer.gradient_checkpointing for layer in layers)
    saved = tmp_path / "checkpointed" / f"checkpoint-{SAVED}"
    found = run("again", resume=saved, **options)
    assert same(found.weights, expected.weights)
    assert found.record == expected.record
    if allocator == "discounted":  # a budget measures other costs and may choose otherwise
        assert same(run("plain").weights, expected.weights)


@needs_factories
def test_every_adapter_parameter_is_held_frozen_or_not(tmp_path):
    model = adapted().model
    adapters = [module for module in model.modules() if hasattr(module, "adapter_params")]
    parts = [module.get_parameter(n) for module in adapters for n in module.adapter_params()]
    parts[0].requires_grad_(False)
    pair = dynalora_optimizer(arguments(tmp_path), active=2)
    trainer = transformers.Trainer(model, optimizer_cls_and_kwargs=pair, args=arguments(tmp_path))
    optimizer = trainer.create_optimizer()
    held = {id(p): g["name"] for g in optimizer.module_groups for p in g["params"]}
    assert {id(p) for p in parts} <= held.keys()
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert held.keys() == trainable | {id(parts[0])}, "and nothing of the frozen base"
    assert set(held.values()) == {*optimizer.groups, "always_active"}


@needs_factories
def test_weight_decay_is_the_trainers_own(tmp_path):
    def decays(**how):
        tiny = build("llama")
        config = LoRAConfig(rank=4, alpha=8, targets=tiny.targets, trainable=["score", "norm"])
        inject(tiny.model, config)
        args = arguments(tmp_path)
        pair = {"optimizer_cls_and_kwargs": dynalora_optimizer(args, active=2)} if how else {}
        optimizer = transformers.Trainer(tiny.model, args, **pair).create_optimizer()
        names = {id(p): name for name, p in tiny.model.named_parameters()}
        found = {
            names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]
        }
        keys = ("lr", "betas", "eps", "fused")
        return found, {tuple(group[key] for key in keys) for group in optimizer.param_groups}

    ours, theirs = decays(ours=True), decays()
    assert ours == theirs
    assert set(ours[0].values()) == {0.0, DECAY}


@needs_factories
def test_the_wrapped_optimizer_can_be_chosen(tmp_path):
    args = arguments(tmp_path, optim="adafactor")
    named, _ = dynalora_optimizer(args, active=2)
    assert named is OptimizerFactory

    def built(**options):
        pair = dynalora_optimizer(args, active=2, **options)
        trainer = transformers.Trainer(adapted().model, args, optimizer_cls_and_kwargs=pair)
        return trainer.create_optimizer()

    assert "Adafactor" in repr(built())
    sgd = built(optimizer_cls=torch.optim.SGD, optimizer_kwargs={"momentum": 0.9})
    assert "SGD" in repr(sgd)
    assert {(g["lr"], g["momentum"]) for g in sgd.param_groups} == {(LR, 0.9)}
    ours = built(optimizer_cls=torch.optim.SGD, optimizer_kwargs={"lr": 0.5})
    assert {g["lr"] for g in ours.param_groups} == {0.5}


@needs_factories
def test_model_init_builds_model_and_optimizer_anew(tmp_path):
    tiny = adapted()
    rows = [{key: value[i] for key, value in tiny.batch.items()} for i in range(4)]
    args = arguments(tmp_path, save_strategy="no")
    trainer = transformers.Trainer(
        args=args,
        model_init=lambda: adapted().model,
        train_dataset=rows,
        optimizer_cls_and_kwargs=dynalora_optimizer(args, **MID_PERIOD),
    )
    trainer.train()
    first, optimizer = weights(trainer.model), trainer.optimizer.optimizer
    trainer.train()
    assert trainer.optimizer.optimizer is not optimizer
    assert same(first, weights(trainer.model))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"args": {"learning_rate": 1}}, TypeError, "args=.* is not a TrainingArguments"),
        ({"perod": 3}, TypeError, "no option 'perod'; pass some of active, period, importance"),
        ({"optimizer_cls": "AdamW"}, TypeError, "optimizer_cls='AdamW' is not a class"),
        ({"optimizer_kwargs": {"weight_decay": 1}}, ValueError, r"TrainingArguments\(weight_decay"),
    ],
    ids=["args", "unknown", "class", "weight decay"],
)
def test_a_bad_option_is_refused_at_once(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        dynalora_optimizer(**{"args": arguments(tmp_path), **options})


@needs_factories
@pytest.mark.parametrize(
    "choice",
    [(lambda: None, {}), (torch.optim.AdamW, {"params": []})],
    ids=["a factory", "own parameters"],
)
def test_an_optimizer_that_chooses_parameters_is_refused(choice, tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setattr(
        transformers.Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda *_: choice)
    )
    with pytest.raises(ValueError, match=r"args.optim=.* cannot be wrapped.*optimizer_cls"):
        OptimizerFactory()(adapted().model, args=args)


def test_an_option_out_of_range_or_no_adapters_are_refused_before_the_first_step(tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="active=99 exceeds the 8"):
        OptimizerFactory()(adapted().model, args=args, active=99)
    with pytest.raises(ValueError, match="no adapter"):
        OptimizerFactory()(build("bert").model, args=args)


def test_a_trainer_that_hands_over_no_model_is_told():
    """transformers 5.0 calls optimizer_cls(param_groups, **kwargs) with whatever it is given."""
    with pytest.raises(NotImplementedError, match=r"Upgrade it, or .*optimizers=\(optimizer, None"):
        OptimizerFactory([{"params": []}], active=2)


def test_the_callback_logs_and_leaves_its_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    callbacks = [AllocationCallback()]
    # Given, not built: the callback takes either.
    run = by_trainer(
        tmp_path,
        MID_PERIOD,
        factory=False,
        callbacks=callbacks,
        eval_strategy="steps",
        eval_steps=4,
    )
    logs = run.trainer.state.log_history
    trained = [log for log in logs if "loss" in log]
    assert len(trained) == STEPS // 2
    assert {log["active_groups"] for log in trained} == {3}
    assert all("predicted_peak_bytes" not in log for log in trained), "there is no budget"
    assert all("active_groups" not in log for log in logs if "loss" not in log)
    assert "'active_groups': " in capsys.readouterr().out, "the callbacks after it print it"
    record = json.loads((tmp_path / "allocation.json").read_text("utf-8"))
    assert record == run.record
    assert (tmp_path / "allocation.png").read_bytes()[:4] == b"\x89PNG"
    saved = json.loads((tmp_path / f"checkpoint-{SAVED}" / "trainer_state.json").read_text("utf-8"))
    assert saved["log_history"][0]["active_groups"] == 3


def test_the_callback_reports_on_a_budget(tmp_path):
    allocation = {"period": 1, "allocator": Budget(memory=0.8, compute=0.8)}
    run = by_trainer(tmp_path, allocation, callbacks=[AllocationCallback()], logging_steps=1)
    trained = [log for log in run.trainer.state.log_history if "loss" in log]
    whole = run.optimizer.memory_report().all_active.peak
    assert all(0 < log["predicted_peak_bytes"] <= 0.8 * whole for log in trained)
    assert len({log["backward_share"] for log in trained}) > 1
    assert all(log["backward_share"] > 0 for log in trained)
    assert {log["active_groups"] for log in trained} > {2}


def test_without_matplotlib_the_record_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    by_trainer(tmp_path, MID_PERIOD, factory=False, callbacks=[AllocationCallback()])
    assert (tmp_path / "allocation.json").is_file()
    assert not (tmp_path / "allocation.png").exists()


def test_the_callback_refuses_another_optimizer(tmp_path):
    tiny = adapted()
    trainer = transformers.Trainer(
        tiny.model, arguments(tmp_path), train_dataset=[{}] * 4, callbacks=[AllocationCallback()]
    )
    with pytest.raises(TypeError, match="the Trainer has AdamW; pass to the Trainer optimizer_cls"):
        trainer.train()
