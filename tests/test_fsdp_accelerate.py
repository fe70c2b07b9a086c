"""FSDP2 through Accelerate, which replaces the parameters of an optimizer built before."""

from __future__ import annotations

import os

import pytest
import torch
from processes import CLIPPED_SHARDS, NEEDS_NEW_ACCELERATE, on_ranks
from test_ddp import rows
from toy import ToyModel, same, wrapped

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


def resume_both(rank: int, folder: str):
    accelerator = sharding_accelerator(rank)
    return {kind: resume(accelerator, rank, folder, kind) for kind in KINDS}


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
