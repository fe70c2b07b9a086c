"""`Budget(total=...)` under FSDP2: no rank ever holds more than it for training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from budgets import adapted, on_budget
from processes import returned_on_ranks
from tiny_models import ROOMY, TinyModel
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from toy import named
from transformers import LlamaConfig, LlamaForCausalLM

from dynalora_optim import Budget, DynamicAllocationOptimizer, LiveBytes, blocks_on_budget
from dynalora_optim._base.live_bytes import storage_bytes
from dynalora_optim._base.trees import tensors
from dynalora_optim.groups._blocks import model_blocks
from dynalora_optim.integrations.transformers import chunk_loss

pytestmark = pytest.mark.distributed
SIZES = replace(ROOMY, blocks=4)
STEPS, MORE = 6, 1.2  # how much more than the least each rank gets
CASES = [
    (units, kind, dtype)
    for units in ("blocks", "whole")
    for kind in ("lora", "blocks", "blocks, loss in chunks")
    for dtype in (torch.float32, torch.bfloat16)
]


def language_model() -> TinyModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=500,
        tie_word_embeddings=False,
    )
    ids = torch.randint(500, (4, 16))
    model, batch = LlamaForCausalLM(config).train(), {"input_ids": ids, "labels": ids}
    return TinyModel("llama", model, batch, targets=[], trainable=[])


def started(
    units: str, kind: str, dtype: torch.dtype, total: int
) -> tuple[TinyModel, DynamicAllocationOptimizer]:
    tiny = adapted("llama", sizes=SIZES) if kind == "lora" else language_model()
    tiny.model.to(dtype)
    if kind.endswith("chunks"):
        chunk_loss(tiny.model)
    for block in model_blocks(tiny.model, must=True) if units == "blocks" else ():
        fully_shard(block.module)
    fully_shard(tiny.model)
    if kind == "lora":
        return tiny, on_budget(tiny, Budget(total=total), rule=AdamW, period=1, pause="drop")
    rule = AdamW(tiny.model.parameters(), lr=1e-3)
    return tiny, blocks_on_budget(tiny.model, rule, total=total, period=1)


def here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def most_held(tiny: TinyModel, optimizer: DynamicAllocationOptimizer) -> int:
    """Train, and return the most bytes that this rank held at a time."""
    most, model = 0, tiny.model
    for _ in range(STEPS):
        there = [*model.parameters(), *model.buffers(), *tensors(list(optimizer.state.values()))]
        before = storage_bytes(map(here, there))
        with LiveBytes() as memory:
            tiny.loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        most = max(most, before + memory.peak)
    return most


def everything(rank: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for case in CASES:
        tiny, optimizer = started(*case, total=1)
        with pytest.raises(ValueError, match="cannot hold a step") as refused:
            tiny.loss()
        least = named(refused.value)
        total = int(MORE * least)
        tiny, optimizer = started(*case, total=total)
        most = most_held(tiny, optimizer)
        found[case] = total, most, [event.chosen for event in optimizer.record]
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return returned_on_ranks(everything)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_rank_holds_more_than_the_total(case, ranks):
    totals, _, choices = zip(*(rank[case] for rank in ranks), strict=True)
    assert totals[0] == totals[1]
    assert choices[0] == choices[1]
    for rank in ranks:
        total, most, _ = rank[case]
        assert 0.5 * total < most <= total
