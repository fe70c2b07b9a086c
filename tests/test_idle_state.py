"""The optimizer state of inactive groups: kept, moved to the host and back, or deleted."""

from __future__ import annotations

import copy
import io
from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language_model import LanguageModel, backward, train
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from toy import ToyModel, same, weights, wrapped
from toy import train as train_toy

from dynalora_optim import DynamicAllocationOptimizer, Pause
from dynalora_optim.update._idle_state import Offload

KINDS = ["keep", "offload", "drop"]


def by_blocks(model: nn.Module, rule: Any = AdamW, **options: Any) -> DynamicAllocationOptimizer:
    settings = {"groups": "blocks", "active": 1, "period": 2, "allocator": "random"}
    return wrapped(model, rule, **{**settings, **options})


def with_state(optimizer: DynamicAllocationOptimizer) -> set[str]:
    """The groups some of whose parameters have a state."""
    held = {parameter for parameter, values in optimizer.state.items() if values}
    return {g["name"] for g in optimizer.module_groups if not held.isdisjoint(g["params"])}


# On any machine


@given(
    kind=st.sampled_from(KINDS),
    active=st.integers(1, 4),
    period=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_state_appears_with_the_first_activation_and_goes_as_asked(kind, active, period, seed):
    model = LanguageModel()
    optimizer = by_blocks(model, pause=kind, active=active, period=period, seed=seed)
    seen = set()
    for step in range(6):
        backward(model, step)
        seen |= set(optimizer.active_groups)
        updated = set(optimizer.active_groups)
        optimizer.step()
        optimizer.zero_grad()
        outside = {"position", "embed_tokens", "norm"}
        left = seen if kind != "drop" else updated & set(optimizer.active_groups)
        assert with_state(optimizer) == outside | left


def test_a_dropped_state_is_as_if_it_had_been_reset():
    ends = []
    for options in ({"pause": "drop"}, {"pause": Pause(moments="reset")}, {}):
        model = LanguageModel()
        train(model, by_blocks(model, allocator="round_robin", period=1, **options), 8)
        ends.append(weights(model))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_dropping_equals_a_new_optimizer_for_every_period():
    model, twin = LanguageModel(), LanguageModel()
    optimizer = by_blocks(model, pause="drop")
    rest = AdamW([p for n, p in twin.named_parameters() if "layers" not in n], lr=0.05)
    names = [f"layers.{i}" for i in range(4)]
    before = ""
    for period in range(6):
        (name,) = optimizer.active_groups
        if name != before:
            block = AdamW(twin.get_submodule(name).parameters(), lr=0.05)
        before = name
        for other in names:
            twin.get_submodule(other).requires_grad_(other == name)
        train(model, optimizer, 2, start=2 * period)
        for step in range(2 * period, 2 * period + 2):
            backward(twin, step)
            for one in (rest, block):
                one.step()
                one.zero_grad()
    assert same(weights(model), weights(twin))
    assert len(set(optimizer.record.counts().values())) > 1, "some block came back at once"


@pytest.mark.parametrize("rule", [AdamW, SGD, torch.optim.RMSprop, torch.optim.NAdam])
def test_offload_is_keep_to_the_last_bit(rule):
    ends = []
    for kind in ("keep", "offload"):
        model = LanguageModel()
        train(model, by_blocks(model, rule, pause=kind, lr=0.01), 10)
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_whatever_becomes_of_idle_state(kind, at):
    model = LanguageModel()
    optimizer = by_blocks(model, pause=kind)
    train(model, optimizer, at)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    twin, its = copy.deepcopy((model, optimizer))
    train(model, optimizer, 6, start=at)
    file.seek(0)
    again = LanguageModel(seed=3)
    resumed = by_blocks(again, pause=kind)
    for thing, saved in zip((again, resumed), torch.load(file, weights_only=True), strict=True):
        thing.load_state_dict(saved)
    train(again, resumed, 6, start=at)
    train(twin, its, 6, start=at)
    assert same(weights(again), weights(model))
    assert same(weights(twin), weights(model))


def test_adapters_too():
    ends = []
    for kind in ("keep", "offload"):
        model = ToyModel()
        train_toy(model, wrapped(model, active=2, period=1, pause=kind), 8)
        ends.append(weights(model))
    assert same(*ends)
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=1, pause="drop")
    train_toy(model, optimizer, 8)
    assert with_state(optimizer) <= {"always_active", *optimizer.active_groups}


class Averaging(AdamW):
    """Has modes, as schedule-free optimizers do."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


class Iterates(SGD):
    """Holds the iterate, which shows only in its state."""

    first = 1  # the update after which it does

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["updates"] = state.get("updates", 0) + 1
                    if state["updates"] >= self.first:
                        state.setdefault("z", parameter.detach().clone())


class Late(Iterates):
    first = 3


class MadeOnce(SGD):
    """Creates its state when it is built."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["mask"] = torch.ones_like(parameter)

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(self.state[parameter]["mask"] * parameter.grad)


@pytest.mark.parametrize("pause", [Pause(state="drop"), Pause(moments="reset")])
def test_state_that_is_created_only_once_is_not_deleted(pause):
    model = LanguageModel()
    with pytest.raises(ValueError, match="MadeOnce creates only when it is built; pass 'keep'"):
        by_blocks(model, MadeOnce, pause=pause)
    train(model, by_blocks(model, MadeOnce), 3)


@pytest.mark.parametrize("rule", [torch.optim.ASGD, Averaging, Iterates])
def test_what_cannot_be_made_anew_is_not_dropped(rule):
    model = LanguageModel()
    with pytest.raises(
        ValueError, match=rf"Pause\(state='drop'\) would delete state that {rule.__name__}"
    ):
        by_blocks(model, rule, pause="drop")
    by_blocks(model, rule, pause="offload").close()


def test_an_iterate_that_shows_late_is_not_dropped_either():
    model = LanguageModel()
    optimizer = by_blocks(model, Late, pause="drop", period=3, allocator="round_robin")
    train(model, optimizer, 2)
    backward(model)
    with pytest.raises(ValueError, match="an optimizer whose state has 'z'"):
        optimizer.step()
    assert with_state(optimizer) >= {"layers.0"}


def test_other_settings_are_refused():
    with pytest.raises(ValueError, match="state='disk'"):
        by_blocks(LanguageModel(), pause="disk")
    with pytest.raises(TypeError, match="pause=3"):
        by_blocks(LanguageModel(), pause=3)


# With devices that are not there


class Elsewhere(Tensor):
    """A tensor that is on this machine's CPU and says that it is on another device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("xpu", 0)

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor).clone()


def elsewhere(*values: float) -> Tensor:
    return torch.tensor(values).as_subclass(Elsewhere)


def test_offload_moves_what_is_on_a_device_and_nothing_else():
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    state: dict[Tensor, dict[str, Any]] = defaultdict(dict)
    count, here = torch.tensor(3.0).as_subclass(Elsewhere), torch.ones(2)
    state[one] = {"step": count, "exp_avg": elsewhere(1, 2), "here": here, "name": "adam"}
    state[other] = {"exp_avg": elsewhere(3, 4)}
    Offload().release(state, [one, nn.Parameter(torch.zeros(1))])
    assert state[one]["step"] is count, "what torch may keep on the host stays where it is"
    assert state[one]["here"] is here
    assert state[one]["name"] == "adam"
    assert type(state[one]["exp_avg"]) is Tensor
    assert state[one]["exp_avg"].tolist() == [1, 2]
    assert type(state[other]["exp_avg"]) is Elsewhere
    assert set(state) == {one, other}, "no state was made by looking"


def test_offload_brings_everything_to_where_its_parameter_is():
    parameter = nn.Parameter(torch.zeros(2, device="meta"))
    count = torch.tensor(3.0)
    state = {parameter: {"step": count, "exp_avg": torch.ones(2), "low": torch.ones(2).bfloat16()}}
    Offload().restore(state, [parameter, nn.Parameter(torch.zeros(1))])
    values = state[parameter]
    assert values["step"] is count
    assert (values["exp_avg"].device.type, values["exp_avg"].dtype) == ("meta", torch.float32)
    assert (values["low"].device.type, values["low"].dtype) == ("meta", torch.bfloat16)


@pytest.mark.parametrize("what", ["state_dict", "plain_state_dict", "copy"])
def test_whoever_reads_the_state_waits_for_the_copies(what, monkeypatch):
    class Copied:
        waits = 0

        def synchronize(self) -> None:
            self.waits += 1

    model = LanguageModel()
    optimizer = by_blocks(model, pause="offload")
    event = Copied()
    monkeypatch.setitem(optimizer._updater._idle_state._copied, torch.device("cuda", 0), event)
    if what == "copy":
        twin = copy.deepcopy(optimizer)
        assert twin._updater._idle_state._copied == {}, "an event cannot be copied, nor need it be"
    else:
        getattr(optimizer, what)()
    assert event.waits == 1
