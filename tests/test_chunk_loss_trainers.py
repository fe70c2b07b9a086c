"""`chunk_loss` in the Trainer, in TRL, under DDP and in compiled models."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from causal_models import VOCABULARY, assert_same, batch, build, step  # noqa: E402

from dynalora_adapters import LoRAConfig, inject  # noqa: E402
from dynalora_optim.integrations.transformers import chunk_loss, dynalora_optimizer  # noqa: E402
from dynalora_optim.loss import LazyLogits  # noqa: E402


def examples() -> list[dict[str, torch.Tensor]]:
    """Rows that differ in how many labels count; one micro-batch has none at all."""
    rows = []
    for seed in range(4):
        data = batch(seed)
        rows += [{name: value[i] for name, value in data.items()} for i in range(3)]
    rows[4]["labels"][:] = rows[5]["labels"][:] = -100
    return rows


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **options,
    }


NUMBERS = ("loss", "grad_norm", "eval_loss", "entropy", "mean_token_accuracy", "num_tokens")


def history(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    log = trainer.state.log_history
    return [{name: entry[name] for name in NUMBERS if name in entry} for entry in log]


def adapted() -> Any:
    model = build()
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "down_proj", "lm_head"]
    return inject(model, LoRAConfig(rank=2, alpha=4, targets=targets))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_trainer_logs_and_learns_the_same(tmp_path, bf16, smoothing):
    """The loss is divided by the labels of the whole accumulated batch, as without chunks."""
    smoother = transformers.trainer_pt_utils.LabelSmoother
    if smoothing and "num_items_in_batch" not in inspect.signature(smoother.__call__).parameters:
        pytest.skip("this version of transformers smooths by the mean of each micro-batch")

    def run(*, chunked: bool) -> Any:
        model = adapted()
        theirs = {} if chunked else {"label_smoothing_factor": smoothing}
        args = transformers.TrainingArguments(**arguments(tmp_path, bf16=bf16, **theirs))
        trainer = transformers.Trainer(
            model,
            args,
            train_dataset=examples(),
            eval_dataset=examples(),
            optimizer_cls_and_kwargs=dynalora_optimizer(args, active=4, period=2),
        )
        if chunked:
            chunk_loss(model, chunk=4, label_smoothing=smoothing)
        log = history(trainer)
        return log, {name: p.detach() for name, p in model.named_parameters()}

    (ours, our_weights), (theirs, their_weights) = run(chunked=True), run(chunked=False)
    tolerance = 3e-2 if bf16 else 1e-5
    assert len(ours) == len(theirs) >= 4
    for mine, other in zip(ours, theirs, strict=True):
        if smoothing:  # in an evaluation, only the Trainer's own factor smooths
            mine.pop("eval_loss", None)
            other.pop("eval_loss", None)
        assert mine == pytest.approx(other, rel=tolerance)
    if not bf16:
        torch.testing.assert_close(our_weights, their_weights, rtol=1e-3, atol=1e-4)


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


@pytest.mark.parametrize("by", ["ours", "peft"])
def test_trl_trains_and_measures_the_same(tmp_path, by):
    """TRL 1.16 has a loss in chunks of its own; older ones take their metrics from the logits."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    peft = pytest.importorskip("peft")
    rows = [
        {"input_ids": r["input_ids"].tolist(), "labels": r["labels"].tolist()} for r in examples()
    ]

    def run(*, chunked: bool) -> Any:
        torch.manual_seed(0)
        config = LoRAConfig(rank=2, alpha=4, targets=["q_proj", "down_proj"])
        model = build()
        if by == "ours":
            inject(model, config)
        else:
            theirs = peft.LoraConfig(r=2, target_modules=config.targets, task_type="CAUSAL_LM")
            model = peft.get_peft_model(model, theirs)
        dataset = datasets.Dataset.from_list(rows)
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                **arguments(tmp_path, dataset_kwargs={"skip_prepare_dataset": True})
            ),
            train_dataset=dataset,
            eval_dataset=dataset,
            processing_class=tokenizer(),
        )
        if chunked:
            chunk_loss(model, chunk=4)
        return history(trainer)

    ours, theirs = run(chunked=True), run(chunked=False)
    assert any("mean_token_accuracy" in entry for entry in theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


def test_metrics_over_lazy_logits_are_those_of_logits():
    """As TRL computed them until it had a loss of its own: from ``outputs.logits``."""

    def metrics(logits: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            rows = logits.reshape(-1, logits.shape[-1])
            logs = [torch.log_softmax(part, dim=-1) for part in rows.split(5, dim=0)]
            entropy = torch.cat([-(log.exp() * log).sum(-1) for log in logs])
            guesses = logits[..., :-1, :].contiguous().argmax(dim=-1)
        return entropy, guesses == labels[..., 1:]

    model = build()
    inputs = batch()
    expected = metrics(model(**inputs).logits, inputs["labels"])
    with chunk_loss(model, chunk=4):
        logits = model(**inputs).logits
        assert isinstance(logits, LazyLogits)
        for found, value in zip(metrics(logits, inputs["labels"]), expected, strict=True):
            torch.testing.assert_close(found, value)


def test_a_compiled_model_keeps_its_own_way():
    model = build()
    inputs = batch()
    loss, gradients = step(model, inputs)
    theirs = loss, {f"_orig_mod.{name}": gradient for name, gradient in gradients.items()}
    with chunk_loss(model):
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            assert_same(step(compiled, inputs), theirs, 1e-6)
        assert type(compiled(**inputs).logits) is torch.Tensor


@pytest.mark.distributed
@pytest.mark.parametrize("own_unit", [False, True])
def test_under_fsdp2_the_head_is_chunked_if_it_is_gathered(own_unit, caplog):
    """The root gathers its head for the whole forward; a head of its own unit is sharded again."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = build()
        theirs = step(model, batch())
        model.zero_grad()
        mesh = init_device_mesh("cpu", (1,))
        chunk_loss(model, chunk=4)
        for part in [*model.model.layers, *([model.lm_head] if own_unit else []), model]:
            fully_shard(part, mesh=mesh)
        loss, gradients = step(model, batch())
        ours = loss, {name: gradient.full_tensor() for name, gradient in gradients.items()}
        assert_same(ours, theirs, 1e-6)
        assert ("the head's weight is sharded" in caplog.text) is own_unit
    finally:
        distributed.destroy_process_group()


@pytest.mark.distributed
def test_under_ddp_the_gradients_are_the_models_own():
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = adapted()
        theirs = step(model, batch())
        with chunk_loss(model, chunk=4):
            wrapped = DistributedDataParallel(model)
            wrapped(**batch()).loss.backward()
            wrapped.zero_grad()
            loss, gradients = step(wrapped, batch())
        ours = loss, {name.removeprefix("module."): g for name, g in gradients.items()}
        assert_same(ours, theirs, 1e-6)
    finally:
        distributed.destroy_process_group()
