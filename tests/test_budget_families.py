"""The budget holds for every causal language model of transformers, whatever its blocks are."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from budgets import clear, gradients, measured, on_budget
from every_causal_lm import OPTIONS, causal_lm, seeded_loss
from test_budget_mixed import batches

from dynalora_optim import Budget

transformers = pytest.importorskip("transformers")
STEPS = 15


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_no_step_exceeds_the_budget_nor_changes_a_gradient(name):
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"this version of transformers has no {name}")
    tiny, unshaped = causal_lm(name), causal_lm(name)
    unshaped.model.load_state_dict(tiny.model.state_dict())
    given, expected, whole = [*batches(tiny)], [], 0
    for unshaped.batch in given:
        clear(unshaped)
        whole = max(whole, measured(partial(seeded_loss, unshaped))[0])
        expected.append(gradients(unshaped))
    budget = Budget(memory=round(0.75 * whole), base="random")
    optimizer = on_budget(tiny, budget, period=1, lr=0.0)
    measured_before = 0
    for step in range(STEPS):
        clear(tiny)
        tiny.batch = given[step % len(given)]
        peak, _ = measured(partial(seeded_loss, tiny))
        assert peak <= budget.memory, step
        now, known = optimizer._costing._now, len(optimizer._costing._shapes.entries)
        if known == measured_before:  # else the peak is that of measuring, too
            assert peak <= now.here.in_no_loop().peak(now.plan)
        measured_before = known
        found = gradients(tiny)
        assert found
        for key, gradient in found.items():
            want = expected[step % len(given)][key]
            torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-6)
        optimizer.step()
    assert len({entry.chosen for entry in optimizer.record}) > 1
