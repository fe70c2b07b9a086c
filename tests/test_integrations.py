"""The one line in other people's loops: Accelerate, Trainer, and several processes (refused)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny_models import build
from torch.optim.lr_scheduler import LambdaLR
from toy import ToyModel, batch, same, train, weights, wrapped

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import DynamicAllocationOptimizer

MICRO_BATCHES = 20


def decay(step: int) -> float:
    return 1 / (1 + step)


def by_hand(options):
    """The loop that Accelerate runs, in plain torch: accumulate two, clip, step, schedule."""
    model = ToyModel()
    optimizer = wrapped(model, **options)
    scheduler = LambdaLR(optimizer, decay)
    for micro in range(MICRO_BATCHES):
        (model(batch(micro)).square().mean() / 2).backward()
        if micro % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return weights(model), optimizer


def by_accelerate(options, folder: Path, *, start: int = 0, stop: int = MICRO_BATCHES):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = ToyModel(seed=3 if start else 0)
    optimizer = wrapped(model, **options)
    model, prepared, scheduler = accelerator.prepare(model, optimizer, LambdaLR(optimizer, decay))
    if start:
        accelerator.load_state(str(folder))
    for micro in range(start, stop):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch(micro)).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            prepared.step()
            scheduler.step()
            prepared.zero_grad()
    if stop < MICRO_BATCHES:
        accelerator.save_state(str(folder))
    return weights(accelerator.unwrap_model(model)), optimizer


@pytest.mark.parametrize("lr_time", ["global", "local"])
@pytest.mark.parametrize("importance", ["forward", "gradient"])
def test_an_accelerate_loop_is_the_plain_loop_and_resumes_bit_for_bit(
    lr_time, importance, tmp_path
):
    options = {"active": 2, "period": 2, "lr_time": lr_time, "importance": importance}
    expected, reference = by_hand(options)
    found, optimizer = by_accelerate(options, tmp_path)
    assert same(found, expected)
    assert optimizer.record.state_dict() == reference.record.state_dict()
    assert optimizer.record[-1].step == MICRO_BATCHES // 2, "micro-batches do not move the clock"
    by_accelerate(options, tmp_path, stop=10)
    found, optimizer = by_accelerate(options, tmp_path, start=10)
    assert same(found, expected)
    assert optimizer.record.state_dict() == reference.record.state_dict()


def by_trainer(folder: Path, resume: Path | None = None):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    tiny = build("bert")
    torch.manual_seed(0)
    config = LoRAConfig(rank=4, alpha=8, targets=tiny.targets, trainable=tiny.trainable)
    inject(tiny.model, config)
    inner = torch.optim.AdamW(tiny.model.parameters(), lr=1e-2)
    optimizer = DynamicAllocationOptimizer(inner, tiny.model, active=2, period=3)
    rows = [{key: value[i] for key, value in tiny.batch.items()} for i in range(4)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        save_steps=4,
        per_device_train_batch_size=2,
        warmup_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        tiny.model, arguments, train_dataset=rows * 8, optimizers=(optimizer, None)
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return weights(tiny.model), optimizer


def test_trainer_trains_and_resumes_bit_for_bit(tmp_path):
    expected, reference = by_trainer(tmp_path / "straight")
    found, optimizer = by_trainer(tmp_path / "again", tmp_path / "straight" / "checkpoint-4")
    assert same(found, expected)
    assert [entry.step for entry in optimizer.record] == [0, 3, 6]
    assert optimizer.record.state_dict() == reference.record.state_dict()


def _one_rank(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    model = ToyModel()
    early = wrapped(model, period=2)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    try:
        assert torch.distributed.get_world_size() == 2
        with pytest.raises(NotImplementedError, match="world size 2"):
            wrapped(ToyModel())
        train(model, early, 1)
        with pytest.raises(NotImplementedError, match="Train in one process"):
            train(model, early, 1, start=1)
    finally:
        torch.distributed.destroy_process_group()
    Path(folder, f"refused-{rank}").touch()


def test_several_processes_are_refused_rather_than_trained_apart(tmp_path):
    torch.multiprocessing.spawn(_one_rank, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "refused-0").exists()
    assert (tmp_path / "refused-1").exists()
