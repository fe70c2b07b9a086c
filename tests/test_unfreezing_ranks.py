"""Gradual unfreezing on two real processes: DDP and FSDP2, beside the plain optimizer there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from processes import on_ranks
from test_fsdp import BF16_REDUCED_IN_32, full, shard
from test_unfreezing import adapters, frozen, held, unfreeze
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from toy import ToyModel, batch, names, same, wrapped

from dynalora_optim import DynamicAllocationOptimizer

pytestmark = pytest.mark.distributed
JOIN, STOP = 2, 6  # the last layers are unfrozen after so many steps; the run ends after so many
LATE = names()[3:]


class Case(NamedTuple):
    """How the model is distributed, whether a param group is added for what is unfrozen, and the
    first layer of that: 0 if the head alone trains at first.
    """

    how: str
    added: bool = False
    options: dict[str, Any] = {}
    first: int = 3


CASES = {
    "DDP that was built before they were frozen": Case("ddp first"),
    "DDP that is built anew": Case("ddp anew"),
    "DDP that is built anew, a group": Case("ddp anew", added=True),
    "DDP that is built anew, a head alone": Case("ddp anew", first=0),
    "FSDP2": Case("blocks"),
    "FSDP2, a head alone": Case("blocks", first=0),
    "FSDP2, a group": Case("blocks", added=True),
    "FSDP2, whole": Case("whole"),
    "FSDP2, adapters": Case("adapters", added=True),
    # torch itself raises an error if a whole unit is frozen in the first forward.
    "FSDP2, whole, bfloat16": Case("whole", options=BF16_REDUCED_IN_32),
}
SHARDED = ("FSDP2", "FSDP2, a group", "FSDP2, a head alone")
PARTS = ("adapters", "head")
UNUSED = {"find_unused_parameters": True}


class Run:
    """A model on this rank, and its optimizer."""

    def __init__(self, case: Case, allocation: dict[str, Any] | None) -> None:
        self.case = case
        self.model = ToyModel() if case.how == "ddp first" else frozen(case.first)
        self.called: nn.Module = self.model
        if case.how == "ddp first":
            self.called = DistributedDataParallel(self.model, **UNUSED)
            for parameter in adapters(self.model, slice(3, None)):
                parameter.requires_grad_(False)
        elif case.how == "ddp anew":
            self.called = DistributedDataParallel(self.model)
        else:
            shard(self.model, case.how, **case.options)
        self.optimizer: Any = held(self.model, case.added)
        if allocation:
            self.optimizer = DynamicAllocationOptimizer(self.optimizer, self.model, **allocation)

    def unfreeze(self) -> None:
        unfreeze(self.model, self.optimizer, self.case.added, self.case.first)
        if self.case.how == "ddp anew":
            self.called = DistributedDataParallel(self.model)

    def step(self, number: int) -> None:
        x = batch(2 * number + torch.distributed.get_rank())
        self.called(x).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def trained(self) -> tuple[nn.Module, Any]:
        return self.model, self.optimizer

    def weights(self) -> dict[str, Tensor]:
        return full(self.model)


def all_active(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the plain optimizer, and of ours."""
    ends = []
    for allocation in (None, {"active": 1.0}):
        run = Run(CASES[case], allocation)
        for number in range(STOP):
            if number == JOIN:
                run.unfreeze()
            run.step(number)
        ends.append(run.weights())
    return ends[0], ends[1]


def in_turns(case: str) -> tuple[list[set[str]], list[set[str]], dict[str, Tensor]]:
    """Which modules were active and which moved in each step, and the weights at the end."""
    run = Run(CASES[case], {"active": 2, "period": 1, "allocator": "round_robin"})
    active, moved = [], []
    for number in range(STOP + 4):
        if number == JOIN:
            run.unfreeze()
        before = run.weights()
        active.append(set(run.optimizer.active_groups))
        run.step(number)
        after = run.weights()
        changed = {n.rsplit(".", 1)[0] for n in after if not torch.equal(before[n], after[n])}
        moved.append(changed - {"head"})
    return active, moved, run.weights()


def resumed(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """How a run ends that is saved after the modules have joined, and how the resumed one does."""
    allocation = {"active": 2, "period": 2}
    first, second = Run(CASES[case], allocation), Run(CASES[case], allocation)
    for number in range(STOP):
        if number == JOIN:
            first.unfreeze()
        first.step(number)
    second.unfreeze()
    states = get_model_state_dict(first.model), get_optimizer_state_dict(*first.trained())
    model_state, state = copy.deepcopy(states)  # they are the run's own tensors
    set_model_state_dict(second.model, model_state)
    set_optimizer_state_dict(*second.trained(), state)
    for number in range(STOP, STOP + 4):
        first.step(number)
        second.step(number)
    return first.weights(), second.weights()


def refused(part: str) -> tuple[int, bool, str] | None:
    """The step in which a DDP that was built while ``part`` was frozen raises, and what."""
    model = frozen() if part == "adapters" else ToyModel()
    if part == "head":
        model.head.bias.requires_grad_(False)
    optimizer = wrapped(model, active=1.0)
    ddp = DistributedDataParallel(model)
    for number in range(4):
        before = full(model)
        try:
            ddp(batch(number)).square().mean().backward()
        except RuntimeError as error:
            return number, same(before, full(model)), str(error)
        optimizer.step()
        optimizer.zero_grad()
        if number == 1:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("base" not in name)
    return None


def everything(rank: int) -> dict[tuple[str, str], Any]:
    asked = [(ask, name) for name in CASES for ask in (all_active, in_turns)]
    asked += [(resumed, name) for name in SHARDED] + [(refused, part) for part in PARTS]
    return {(ask.__name__, name): caught(ask, name) for ask, name in asked}


def caught(ask: Callable[[str], Any], name: str) -> Any:
    try:
        return ask(name)
    except Exception as error:
        return error


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[str, str], Any]]:
    return on_ranks(everything)


def of(ranks: list[dict[tuple[str, str], Any]], *key: str) -> list[Any]:
    found = [rank[key] for rank in ranks]
    for answer in found:
        if isinstance(answer, Exception):
            raise answer
    return found


@pytest.mark.parametrize("case", CASES)
def test_all_active_is_the_plain_optimizer_there(case, ranks):
    for expected, found in of(ranks, "all_active", case):
        assert same(expected, found)
        assert not torch.equal(found["layers.5.0.A"], full(ToyModel())["layers.5.0.A"])


@pytest.mark.parametrize("case", CASES)
def test_they_are_chosen_like_the_others_from_then_on(case, ranks):
    (active, moved, end), (others, _, other_end) = of(ranks, "in_turns", case)
    assert active == others, "the ranks choose the same"
    assert same(end, other_end)
    assert active == moved, "who is active moves, and no other module"
    assert set().union(*active[:JOIN]).isdisjoint(LATE)
    assert set().union(*active[JOIN:]) == set(names())


@pytest.mark.parametrize("case", SHARDED)
def test_a_sharded_run_resumes_after_they_have_joined(case, ranks):
    for straight, again in of(ranks, "resumed", case):
        assert same(straight, again)


@pytest.mark.parametrize("part", PARTS)
def test_ddp_that_would_not_average_them_is_refused_with_the_remedy(part, ranks):
    for step, has_stayed, text in of(ranks, "refused", part):
        assert step == 2
        assert has_stayed
        assert "was built while only" in text
        assert "build DistributedDataParallel anew" in text
