"""DeepSpeed ZeRO is refused. It needs a GPU toolchain to install, so a stand-in takes its place."""

from __future__ import annotations

import pytest
import torch
from toy import ToyModel, same, weights, wrapped


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
    with pytest.raises(RuntimeError, match=r"DeepSpeed ZeRO flattens.*use DDP or FSDP2"):
        flatten_as_zero_does(optimizer)
    assert same(weights(model), before)
    assert len(optimizer.record) == 1
    assert not optimizer.state
