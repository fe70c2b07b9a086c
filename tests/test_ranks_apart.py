"""Several ranks in less usual ways: sharded low-precision weights, and weights averaged instead."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from language_model import LanguageModel
from processes import on_ranks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy import ToyModel, batch, wrapped

from dynalora_optim import DynamicAllocationOptimizer

pytestmark = pytest.mark.distributed


def sharded_halves(rank: int, rounding: str) -> tuple[list[float], bool]:
    model = LanguageModel(tied=False).bfloat16()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = DynamicAllocationOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.01),
        model,
        groups="blocks",
        active=1,
        period=2,
        allocator="round_robin",
        master_weights=rounding,
    )
    before = [p.full_tensor().float() for p in model.parameters()]
    for step in range(9):
        x = torch.arange(10).view(2, 5).add(step).remainder(11)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = [p.full_tensor().float() for p in model.parameters()]
    moved = all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return [float(a.sum()) for a in after], moved


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_low_precision_weights_train_on_copies_under_fsdp2(rounding):
    (first, moved), (second, _) = on_ranks(sharded_halves, rounding)
    assert first == second
    assert moved


def local_sgd(rank: int, apart: bool) -> list[str]:
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in places.items()})
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dynalora_optim").addHandler(handler)
    accelerator = Accelerator(cpu=True)
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=2)
    bare = model
    if not apart:
        model, optimizer = accelerator.prepare(model, optimizer)
        assert isinstance(model, DistributedDataParallel)
    with LocalSGD(accelerator, model, local_sgd_steps=4, enabled=not apart) as local:
        for step in range(6):
            accelerator.backward(model(batch(2 * step + rank)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            local.step()
    assert bare.head.weight.isfinite().all()
    return [line for line in lines if "different weights" in line]


def test_ranks_that_average_weights_are_not_told_that_nothing_is_averaged():
    pytest.importorskip("accelerate")
    assert on_ranks(local_sgd, False) == [[], []]


def test_ranks_that_train_apart_are_still_told():
    pytest.importorskip("accelerate")
    assert [len(lines) for lines in on_ranks(local_sgd, True)] == [1, 1]
