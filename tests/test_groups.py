"""Groups: what is recognised as an adapter, how it is named, and what is joined."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy import ToyAdapter, ToyModel, names

from dynalora_optim import AdapterModule
from dynalora_optim.groups._rules import find_groups


def test_adapters_are_found_in_forward_order_under_their_dotted_path():
    model = ToyModel(layers=12)
    groups = find_groups(model)
    assert [group.name for group in groups] == names(12)
    for group in groups:
        assert group.modules == (model.get_submodule(group.name),)
        assert [slot.name for slot in group.slots] == [f"{group.name}.A", f"{group.name}.B"]
        assert list(group.parameters()) == [group.modules[0].A, group.modules[0].B]


def test_an_adapter_is_recognised_by_its_method_alone():
    assert isinstance(ToyAdapter(4), AdapterModule)
    assert not isinstance(nn.Linear(4, 4), AdapterModule)


def test_groups_follow_parameters_that_are_replaced():
    # FSDP2 and accelerate put new Parameter objects in the place of the old ones.
    model = ToyModel(layers=1)
    (group,) = find_groups(model)
    model.layers[0][0].A = nn.Parameter(torch.zeros(2, 8))
    assert next(group.parameters()) is model.layers[0][0].A


def test_nested_parameters_belong_to_the_adapter():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up, self.other = nn.Linear(4, 2), nn.Linear(2, 4), nn.Linear(4, 4)

        def adapter_params(self):
            return ["down", "up.weight"]

    (group,) = find_groups(nn.Sequential(Nested()))
    assert [slot.name for slot in group.slots] == ["0.down.weight", "0.down.bias", "0.up.weight"]


def test_modules_that_share_a_parameter_are_one_group():
    model = ToyModel(layers=4)
    model.layers[3][0].A = model.layers[1][0].A
    groups = find_groups(model)
    assert [group.name for group in groups] == names(3)
    assert groups[1].modules == (model.layers[1][0], model.layers[3][0])
    assert {id(p) for p in groups[1].parameters()} == {
        id(model.layers[1][0].A),
        id(model.layers[1][0].B),
        id(model.layers[3][0].B),
    }
    assert len(list(groups[1].parameters())) == 3


def test_a_chain_of_shared_parameters_is_one_group():
    model = ToyModel(layers=3)
    model.layers[1][0].A = model.layers[2][0].A
    model.layers[0][0].B = model.layers[2][0].B
    (group,) = find_groups(model)
    assert group.name == "layers.0.0"
    assert len(group.modules) == 3


def test_a_callable_names_the_groups():
    model = ToyModel(layers=4)
    groups = find_groups(
        model,
        lambda name, module: f"pair {int(name[7]) // 2}" if name.endswith(".0.base") else None,
    )
    assert [group.name for group in groups] == ["pair 0", "pair 1"]
    assert [slot.name for slot in groups[0].slots] == [
        f"layers.{i}.0.base.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    ]


def test_a_model_without_adapters_is_refused_with_the_remedies():
    with pytest.raises(ValueError, match=r"groups='auto' found no adapter in Linear.*inject.*peft"):
        find_groups(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="named no module of Linear"):
        find_groups(nn.Linear(2, 2), lambda name, module: None)


@pytest.mark.parametrize("rule", ["all", None, 3])
def test_other_rules_are_refused(rule):
    with pytest.raises(TypeError, match=r"groups=.*'auto', 'blocks', .* or a callable"):
        find_groups(ToyModel(), rule)
