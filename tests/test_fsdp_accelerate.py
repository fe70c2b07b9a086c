"""FSDP2 through Accelerate, which replaces the parameters of an optimizer built before."""

from __future__ import annotations

import os

import pytest
import torch
from processes import CLIPPED_SHARDS, NEEDS_NEW_ACCELERATE, on_ranks
from test_ddp import rows
from test_fsdp_budget import Wide
from test_fsdp_budget import rows as wide_rows
from toy import ToyModel, same, wrapped

from dynalora_optim import Budget, LiveBytes

pytest.importorskip("accelerate")

STOP, STEPS = 4, 8
pytestmark = [
    pytest.mark.distributed,
    NEEDS_NEW_ACCELERATE,
]
KINDS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")


def sharding_accelerator(rank: int):
    """An Accelerator that shards on the CPU, where its own launcher offers DDP only."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, but not used
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=True)
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    assert accelerator.num_processes == 2
    return accelerator


def sharding(kind: str):
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Sequential"],
        state_dict_type=kind,
        cpu_ram_efficient_loading=False,
    )


def make(seed: int):
    model = ToyModel(seed=seed).double()
    return model, wrapped(model, lr=0.02, active=2, period=3)


def resume(accelerator, rank: int, folder: str, kind: str):
    """Save in step 4, go on, and go on from there once more; return both ends."""
    accelerator.state.fsdp_plugin = sharding(kind)
    assert accelerator.is_fsdp2
    ends = []
    for seed in (0, 3):
        accelerator._models.clear()
        accelerator._optimizers.clear()
        model, optimizer = accelerator.prepare(*make(seed))
        for step in range(STOP if ends else 0, STEPS):
            if ends and step == STOP:
                accelerator.load_state(f"{folder}/{kind}")
            elif step == STOP:
                accelerator.save_state(f"{folder}/{kind}")
            accelerator.backward(model(rows(step, rank)).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        found = {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}
        ends.append((found, [(e.step, e.chosen) for e in optimizer.optimizer.record]))
    return ends


def on_a_budget(accelerator, rank: int, folder: str):
    """Train on a budget; save in step 4, go on, and go on from there once more."""
    accelerator.state.fsdp_plugin = sharding("SHARDED_STATE_DICT")
    ends = []
    for _ in range(2):
        accelerator._models.clear()
        accelerator._optimizers.clear()
        model = Wide().double()
        inner = wrapped(model, lr=0.02, period=1, allocator=Budget(memory=0.4, compute=0.6))
        model, optimizer = accelerator.prepare(model, inner)
        peaks, losses = [], []
        for step in range(STOP if ends else 0, STEPS):
            if ends and step == STOP:
                accelerator.load_state(f"{folder}/budget")
            elif step == STOP:
                accelerator.save_state(f"{folder}/budget")
            with LiveBytes() as memory:
                loss = model(wide_rows(step, rank).double()).square().mean()
                accelerator.backward(loss)
                losses.append(float(loss.detach()))
                del loss
            peaks.append(memory.peak)
            optimizer.step()
            optimizer.zero_grad()
        inner = optimizer.optimizer
        limit = inner.allocator.limit(inner._allocation.costs)
        found = {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}
        ends.append((found, [entry.chosen for entry in inner.record], losses, peaks, limit))
    return ends


def resume_both(rank: int, folder: str):
    accelerator = sharding_accelerator(rank)
    found = {kind: resume(accelerator, rank, folder, kind) for kind in KINDS}
    return {**found, "budget": on_a_budget(accelerator, rank, folder)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(resume_both, str(tmp_path_factory.mktemp("states")))


@pytest.fixture(scope="module")
def alone():
    model, optimizer = make(0)
    for step in range(STEPS):
        model(rows(step, None)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return weights, [(e.step, e.chosen) for e in optimizer.record]


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_one_process_does_and_resumes_bit_for_bit(kind, ranks, alone):
    for rank in ranks:
        straight, resumed = rank[kind]
        assert same(straight[0], resumed[0])
        assert resumed[1][-1] == straight[1][-1]
        assert straight[1] == alone[1]
        for name, value in alone[0].items():
            torch.testing.assert_close(straight[0][name], value, atol=CLIPPED_SHARDS, rtol=0)


def test_a_budget_holds_and_resumes_bit_for_bit(ranks):
    (one, _), (other, _) = (rank["budget"] for rank in ranks)
    assert one[1] == other[1]
    assert len(set(one[1])) > 2
    for straight, resumed in (rank["budget"] for rank in ranks):
        assert same(straight[0], resumed[0])
        assert straight[2][STOP:] == resumed[2]
        for _, _, _, peaks, limit in (straight, resumed):
            assert max(peaks[1:]) <= limit
