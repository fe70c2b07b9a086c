"""A parameter that leaves its place in mid-run is named, and disturbs no other optimizer."""

from __future__ import annotations

import pytest
import torch
from kinds import Foreign, foreign_groups
from torch import nn
from torch.nn.utils import parametrizations, prune
from toy import ToyModel, same, train, weights, wrapped

from dynalora_optim import DynamicAllocationOptimizer


def pruned(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


def parametrized(layer: nn.Linear) -> None:
    parametrizations.spectral_norm(layer)


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("change", [pruned, parametrized])
def test_what_has_left_its_place_is_named_and_a_new_optimizer_finds_it(change, active):
    model = ToyModel(layers=3)
    for layer in model.layers:
        layer[0] = Foreign()
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    optimizer = DynamicAllocationOptimizer(inner, model, groups=foreign_groups)
    optimizer.hold([optimizer.groups[0] if active else optimizer.groups[1]])
    train(model, optimizer, 1)
    change(model.layers[0][0].inner)
    with pytest.raises(RuntimeError, match=r"at layers\.0\.0\.inner\.weight, found nothing. close"):
        train(model, optimizer, 1)
    train(other := ToyModel(), torch.optim.SGD(other.parameters(), lr=0.1), 1)
    optimizer.close()
    optimizer.zero_grad()

    optimizer = DynamicAllocationOptimizer(inner, model, groups=foreign_groups)
    optimizer.hold([optimizer.groups[0]])
    before = weights(model)
    train(model, optimizer, 1)
    after = weights(model)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name.split(".inner")[0] for name in moved} == {"layers.0.0", "head.weight", "head.bias"}


def test_a_parameter_that_was_removed_is_named():
    model = ToyModel(layers=3)
    optimizer = wrapped(model, active=3)
    train(model, optimizer, 1)
    model.layers[0][0].A = None
    before = weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match=r"at layers\.0\.0\.A, found nothing"):
        optimizer.step()
    assert same(weights(model), before)
