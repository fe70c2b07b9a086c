"""DeepSpeed ZeRO is refused. Few have it installed, so a stand-in takes its place in fast tests."""

from __future__ import annotations

import importlib.util
import os
import re

import pytest
import torch
from processes import on_ranks
from toy import ToyModel, batch, same, weights, wrapped

REFUSAL = r"DeepSpeed ZeRO flattens.*use DDP or FSDP2"


def flatten_as_zero_does(optimizer: torch.optim.Optimizer) -> None:
    """What stages 1 and 2 do to an optimizer (deepspeed/runtime/zero/stage_1_and_2.py).

    Each group stays, with all its keys, but holds one float32 copy of its parameters, flattened
    (the part of this rank); the first step is done at once, on gradients of zero.
    """
    for group in optimizer.param_groups:
        flat = torch.cat([p.detach().reshape(-1) for p in group["params"]]).clone().float()
        group["params"] = [flat.requires_grad_(True)]
        flat.grad = torch.zeros_like(flat)
    optimizer.step()


def test_the_stand_in_takes_a_plain_optimizer():
    optimizer = torch.optim.AdamW(ToyModel().parameters())
    flatten_as_zero_does(optimizer)
    assert len(optimizer.state) == 1


@pytest.mark.parametrize("lr", [0.05, 0.0])  # 0.0: a warm-up, which might pass for a rehearsal
def test_flattened_groups_are_refused_before_anything_moves(lr):
    model = ToyModel()
    optimizer = wrapped(model, lr=lr, active=2, period=1)
    before = weights(model)
    with pytest.raises(RuntimeError, match=REFUSAL):
        flatten_as_zero_does(optimizer)
    assert same(weights(model), before)
    assert len(optimizer.record) == 1
    assert not optimizer.state


def step_with_zero(rank: int, stage: int) -> tuple[str, int]:
    """Let DeepSpeed take over and train; return what stops it, and the selections by then."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, but not used
    import deepspeed

    model = ToyModel()
    optimizer = wrapped(model, active=2, period=1)
    config = {
        "train_batch_size": 8,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    engine.backward(engine(batch(rank).bfloat16()).float().square().mean())
    with pytest.raises(RuntimeError) as stopped:
        engine.step()
    return str(stopped.value), len(optimizer.record)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_itself_is_refused_in_its_first_step(stage):
    for found in on_ranks(step_with_zero, stage):
        assert isinstance(found, tuple), found
        assert re.search(REFUSAL, found[0])
        assert found[1] == 1
