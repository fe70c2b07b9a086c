"""The Trainer with FSDP2, which refuses a finished optimizer: the factory's is sharded as any."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import NEEDS_NEW_ACCELERATE, on_ranks
from test_fsdp_budget import Replay
from test_trainer import HAS_FACTORIES, MID_PERIOD, SAVED, by_trainer
from toy import same

from dynalora_optim import Budget, LiveBytes

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.distributed,
    NEEDS_NEW_ACCELERATE,
    pytest.mark.skipif(not HAS_FACTORIES, reason="this Trainer hands over no model"),
]
OPTIONS: dict[str, Any] = {
    "fsdp": "full_shard",
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]},
    "per_device_train_batch_size": 1,
}
ON_BUDGET = {"allocator": Budget(memory=0.9), "period": 1}
ACCUMULATING = {"gradient_accumulation_steps": 2}


def pretend_to_have_devices(rank: int) -> None:
    """Let Accelerate shard on the CPU, where it offers DDP only."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, but not used
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    original = PartialState.__init__

    @functools.wraps(original)
    def init(state: Any, *args: Any, **kwargs: Any) -> None:
        original(state, *args, **kwargs)
        assert state.num_processes == 2
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def outcome(run: Any) -> tuple[dict[str, torch.Tensor], Any]:
    full = {n: p.full_tensor().detach() for n, p in run.trainer.model.named_parameters()}
    return full, [(entry.step, entry.chosen) for entry in run.optimizer.record]


class Peaks(transformers.TrainerCallback):
    """Counts the bytes of the forward and backward of each step."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._memory = LiveBytes().__enter__()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._memory.__exit__(None, None, None)
        self.found.append(self._memory.peak)


def on_a_budget(folder: str) -> Any:
    """Train on a budget, with two micro-batches per step, of which the first is not reduced."""
    peaks = Peaks()
    run = by_trainer(
        Path(folder, "budget"), ON_BUDGET, callbacks=[peaks], **ACCUMULATING, **OPTIONS
    )
    optimizer = run.optimizer
    limit = optimizer.allocator.limit(optimizer._allocation.costs)
    return outcome(run), Replay.of(optimizer)._chosen, peaks.found, limit


def train(rank: int, folder: str) -> Any:
    """Train straight through and, with a new Trainer, from the checkpoint in mid-period on."""
    pretend_to_have_devices(rank)
    straight = by_trainer(Path(folder, "straight"), MID_PERIOD, **OPTIONS)
    assert straight.trainer.is_fsdp_enabled
    assert straight.trainer.args.world_size == 2
    saved = Path(folder, "straight", f"checkpoint-{SAVED}")
    resumed = by_trainer(Path(folder, "again"), MID_PERIOD, resume=saved, **OPTIONS)
    with pytest.raises(RuntimeError, match="Passing `optimizers` is not allowed"):
        by_trainer(Path(folder, "given"), MID_PERIOD, factory=False, **OPTIONS)
    return outcome(straight), outcome(resumed), on_a_budget(folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(train, str(tmp_path_factory.mktemp("ranks")))


def test_the_factory_trains_as_one_process_does_and_resumes_bit_for_bit(
    ranks: list[Any], tmp_path: Path
) -> None:
    alone = by_trainer(tmp_path / "alone", MID_PERIOD)  # the rows of both ranks in each batch
    choices = [(entry.step, entry.chosen) for entry in alone.optimizer.record]
    assert len({chosen for _, chosen in choices}) > 1
    for straight, resumed, _ in ranks:
        assert same(straight[0], resumed[0])
        assert resumed[1][-1] == straight[1][-1]
        assert straight[1] == choices
        for name, value in alone.weights.items():
            torch.testing.assert_close(straight[0][name], value, atol=1e-5, rtol=0)


def test_a_budget_trains_as_one_process_does_and_within_the_limit(
    ranks: list[Any], tmp_path: Path
) -> None:
    (one, chosen, *_), (other, *_) = (rank[2] for rank in ranks)
    assert same(one[0], other[0])
    assert one[1] == other[1]
    replayed = {"allocator": Replay(chosen), "period": 1}
    alone = by_trainer(tmp_path / "alone", replayed, **ACCUMULATING)
    for (found, choices), _, peaks, limit in (rank[2] for rank in ranks):
        assert len({chosen for _, chosen in choices}) > 2
        assert max(peaks[1:]) <= limit
        for name, value in alone.weights.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)
