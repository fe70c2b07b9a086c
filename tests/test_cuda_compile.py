"""On a GPU: inductor's code, of which no choice of active modules asks for more.

Each test runs on the CPU as well, where the code is not generated but all else is the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import build, randomize_trainable
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import SGD
from toy import wrapped

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim.groups._blocks import find_blocks


def compiled_run(
    name: str, how: str, device: str, *, backend: str = "", steps: int = 12
) -> tuple[list[float], list[int], set[tuple[str, ...]]]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    tiny = build(name)
    config = LoRAConfig(rank=2, alpha=4, targets=tiny.targets, trainable=tiny.trainable)
    model: Any = inject(tiny.model, config)
    randomize_trainable(model)
    model.train().to(device)
    inputs = {key: x.to(device) for key, x in tiny.batch.items() if key != "attention_mask"}
    counter = CompileCounterWithBackend(backend or "eager")
    optimizer = wrapped(model, SGD, active=2, period=1, allocator="random")
    if backend and how == "whole":
        model = torch.compile(model, backend=counter, fullgraph=True)
    elif backend:
        for block in find_blocks(model):
            block.module.compile(backend=counter, fullgraph=True)
    losses, frames, chosen = [], [], set()
    for _ in range(steps):
        chosen.add(tuple(optimizer.active_groups))
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        frames.append(counter.frame_count)
    return losses, frames, chosen


@pytest.mark.parametrize(("name", "how"), [("stack", "whole"), ("llama", "blocks")])
def test_reallocations_compile_nothing_anew(name, how, device):
    backend = "inductor" if device == "cuda" else "aot_eager"
    losses, frames, chosen = compiled_run(name, how, device, backend=backend)
    assert len(chosen) > 3
    assert frames[0] == frames[-1] == {"whole": 1, "blocks": 2}[how]
    eager, _, same_choices = compiled_run(name, how, device)
    assert chosen == same_choices
    assert losses == pytest.approx(eager, abs=1e-3 if device == "cuda" else 1e-6)
