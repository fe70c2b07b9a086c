"""The budget over blocks of several kinds, and over batches whose values change what they take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from budgets import TRANSFORMERS, clear, gradients, measured, on_budget
from mixed_models import MIXED, skip_unless_it_runs
from tiny_models import TinyModel
from torch import Tensor

from dynalora_optim import Budget

STEPS = 24
SHARES = {"swin": 0.9}  # whose blocks are two stages


def batches(tiny: TinyModel) -> Iterator[dict[str, Tensor]]:
    """As the model's, fewer rows, shorter ones, tokens that are all alike, and padding."""
    whole = tiny.batch
    yield whole
    yield {name: value[:-1] for name, value in whole.items()}
    if "input_ids" not in whole:
        return
    length = whole["input_ids"].shape[1]
    yield {n: v[:, :-3] if v.ndim > 1 and v.shape[1] == length else v for n, v in whole.items()}
    alike = torch.full_like(whole["input_ids"], 5)
    if "pixel_values" not in whole:
        yield {**whole, "input_ids": alike, **({"labels": alike} if "labels" in whole else {})}
    if "attention_mask" in whole:
        mask = whole["attention_mask"].clone()
        mask[0, -2:] = 0
        yield {**whole, "attention_mask": mask}


@pytest.mark.parametrize("name", MIXED)
def test_no_step_exceeds_the_budget_nor_changes_a_gradient(name):
    tiny, unshaped = MIXED[name](), MIXED[name]()
    skip_unless_it_runs(unshaped)
    if name == "swin" and TRANSFORMERS < "5.7":
        pytest.xfail("Swin takes 2% more than predicted with transformers 5.4")
    unshaped.model.load_state_dict(tiny.model.state_dict())
    given, expected, whole = [*batches(tiny)], [], 0
    for unshaped.batch in given:
        clear(unshaped)
        whole = max(whole, measured(unshaped.loss)[0])
        expected.append(gradients(unshaped))
    budget = Budget(memory=round(SHARES.get(name, 0.75) * whole), base="random")
    optimizer = on_budget(tiny, budget, period=1, lr=0.0)
    differences, measured_before = [], 0
    for step in range(STEPS):
        clear(tiny)
        tiny.batch = given[step % len(given)]
        peak, _ = measured(tiny.loss)
        assert peak <= budget.memory, step
        now = optimizer._costing._now
        here, plan = now.here, now.plan
        known = len(optimizer._costing._shapes.entries)
        if known == measured_before:  # else the peak is that of measuring, too
            differences.append(here.in_no_loop().peak(plan) - peak)
        measured_before = known
        for key, gradient in gradients(tiny).items():
            torch.testing.assert_close(
                gradient, expected[step % len(given)][key], rtol=1e-5, atol=1e-7
            )
        optimizer.step()
    assert min(differences) >= 0
    assert len({entry.chosen for entry in optimizer.record}) > 1
