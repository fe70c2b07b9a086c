"""State in other precisions than float32: loading rounds what the plain optimizer's own rounds."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from toy import ToyModel, batch, same, weights, wrapped

# Some have single numbers in float32 whatever the weights have: torch's load_state_dict casts them
# to the precision of the weights, except those that are named "step".
RULES = ("NAdam", "ASGD", "RAdam", "Rprop", "Adafactor", "Adadelta")


def through_a_file(optimizer: torch.optim.Optimizer) -> None:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_a_run_that_is_loaded_equals_the_plain_one_that_is(name: str, dtype: torch.dtype) -> None:
    rule: Any = getattr(torch.optim, name)
    ours, plain = ToyModel().to(dtype), ToyModel().to(dtype)
    optimizer = wrapped(ours, rule, active=2, period=1, allocator="round_robin")
    twin = rule(plain.parameters(), lr=0.05)
    for step in range(8):
        for group in optimizer.groups:
            layer = plain.get_submodule(group)
            for parameter in (layer.A, layer.B):
                parameter.requires_grad_(group in optimizer.active_groups)
        for model, own in ((ours, optimizer), (plain, twin)):
            model(batch(step).to(dtype)).square().mean().backward()
            own.step()
            own.zero_grad()
            if step in (1, 4):
                through_a_file(own)
        assert same(weights(ours), weights(plain))
    mine, its = optimizer.plain_state_dict()["state"], twin.state_dict()["state"]
    assert mine.keys() == its.keys()
    for key, values in its.items():
        for kind, value in values.items():
            assert torch.equal(torch.as_tensor(mine[key][kind]), torch.as_tensor(value))
            assert getattr(mine[key][kind], "dtype", None) == getattr(value, "dtype", None)
