"""The one line in an Accelerate loop, in one process."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from toy import ToyModel, backward, batch, same, train, weights, wrapped

from dynalora_optim import Backward

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


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_prepare_takes_the_three_in_any_order(order):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=2)
    things = [model, optimizer, LambdaLR(optimizer, decay)]
    ready = dict(zip(order, accelerator.prepare(*(things[i] for i in order)), strict=True))
    for step in range(6):
        accelerator.backward(ready[0](batch(step)).square().mean())
        ready[1].step()
        ready[2].step()
        ready[1].zero_grad()
    twin = ToyModel()
    plain = wrapped(twin, active=2, period=2)
    scheduler = LambdaLR(plain, decay)
    for step in range(6):
        backward(twin, step)
        plain.step()
        scheduler.step()
        plain.zero_grad()
    assert same(weights(model), weights(twin))
    assert optimizer.record.state_dict() == plain.record.state_dict()


def test_fused_updates_are_those_of_the_plain_loop():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    ends = []
    for fused in (True, False):
        model = ToyModel()
        optimizer = wrapped(model, active=2, period=2, backward=Backward(fused=fused))
        scheduler = LambdaLR(optimizer, decay)
        if fused:
            prepared, by, scheduler = accelerator.prepare(model, optimizer, scheduler)
        else:
            prepared, by = model, optimizer
        for step in range(6):
            prepared(batch(step)).square().mean().backward()
            by.step()
            scheduler.step()
            by.zero_grad()
        ends.append(weights(model))
    assert same(*ends)


def test_bf16_autocast_is_torchs_own():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, twin = ToyModel(), ToyModel()
    optimizer, plain = (wrapped(m, active=2, period=2) for m in (model, twin))
    prepared, by = accelerator.prepare(model, optimizer)
    for step in range(8):
        accelerator.backward(prepared(batch(step)).square().mean())
        with torch.autocast("cpu", torch.bfloat16):
            y = twin(batch(step))
        y.float().square().mean().backward()
        for each in (by, plain):
            each.step()
            each.zero_grad()
    assert same(weights(model), weights(twin))
    assert optimizer.record.state_dict() == plain.record.state_dict()
    assert not same(weights(model), float32_weights()), "autocast must have changed something"


def float32_weights():
    model = ToyModel()
    train(model, wrapped(model, active=2, period=2), 8)
    return weights(model)


def test_a_step_that_the_scaler_skips_moves_nothing_and_counts_nothing():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler

    accelerate.Accelerator(cpu=True)  # the state that the two read
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    prepared = AcceleratedOptimizer(optimizer, scaler=scaler)
    scheduler = AcceleratedScheduler(LambdaLR(optimizer, decay), prepared, split_batches=True)
    for step, factor in enumerate([1.0, 1.0, float("inf"), 1.0]):
        before = weights(model), len(optimizer.record), optimizer.param_groups[0]["lr"]
        scaler.scale(model(batch(step)).square().mean() * factor).backward()
        prepared.step()
        scheduler.step()
        prepared.zero_grad()
        assert prepared.step_was_skipped == (factor != 1)
        if factor != 1:
            after = weights(model), len(optimizer.record), optimizer.param_groups[0]["lr"]
            assert same(before[0], after[0])
            assert before[1:] == after[1:]
    assert [entry.step for entry in optimizer.record] == [0, 2], "three steps were done"
    assert not any(map(math.isnan, optimizer.tracker.scores().values()))


def test_the_record_goes_to_a_tracker():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.tracking import GeneralTracker

    class Kept(GeneralTracker):
        name = "kept"
        requires_logging_directory = False

        def __init__(self):
            super().__init__()
            self.logged = []

        tracker = property(lambda self: self.logged)

        def log(self, values, step=None, **kwargs):
            self.logged.append((step, values))

    kept = Kept()
    accelerator = accelerate.Accelerator(cpu=True, log_with=kept)
    accelerator.init_trackers("a run")
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=2)
    train(model, optimizer, 4)
    accelerator.log(optimizer.record.counts(), step=4)
    accelerator.end_training()
    ((step, values),) = kept.logged
    assert step == 4
    assert values == optimizer.record.counts()
    assert sum(values.values()) == 4 * 2
