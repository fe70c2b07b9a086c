"""On a GPU: between two reallocations the host never waits for it.

Each test runs on the CPU as well, where whatever asks for a number is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from devices import FUSED, OFFLOAD, no_waiting, values_asked_for
from torch import nn
from torch.optim import AdamW
from toy import ToyModel, batch

from dynalora_optim import Budget, DynamicAllocationOptimizer


def toy(device: str) -> ToyModel:
    return ToyModel().to(device)


WAITLESS: dict[str, tuple[Callable[[str], nn.Module], dict[str, Any]]] = {
    "all active": (toy, {"active": 1.0}),
    "2/3 active": (toy, {}),
    "gradient measure": (toy, {"importance": "gradient"}),
    "sensitivity": (toy, {"importance": "sensitivity"}),
    "local rates": (toy, {"lr_time": "local"}),
    "offload": (toy, OFFLOAD),
    "updates within the backward pass": (toy, FUSED),
    "budget": (toy, {"allocator": Budget(0.9)}),
    "copies in float32": (
        lambda device: toy(device).bfloat16(),
        {"master_weights": "nearest"},
    ),
}


@pytest.mark.parametrize(("make", "options"), WAITLESS.values(), ids=WAITLESS)
@pytest.mark.parametrize("rule", [{"fused": True}, {"foreach": True}], ids=str)
def test_a_step_between_two_reallocations_never_waits_for_the_gpu(make, options, rule, device):
    def steps_of(wrap: bool) -> Callable[[], None]:
        model = make(device)
        dtype = next(model.parameters()).dtype
        optimizer: Any = AdamW(model.parameters(), lr=0.01, **rule)
        if wrap:
            options_here = {"period": 100, **options}
            optimizer = DynamicAllocationOptimizer(optimizer, model, **options_here)
        inputs = batch().to(device, dtype)

        def step() -> None:
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(3):  # state, costs and the rehearsal of fused updates come with the first
            step()
        return step

    ours, plain = steps_of(True), steps_of(False)
    with no_waiting(device):
        for _ in range(4):
            ours()
    # Adam counts its steps on the host; whatever else asks for a number would wait on a GPU.
    if not ("foreach" in rule or options == FUSED):
        assert values_asked_for(ours) == values_asked_for(plain)
