"""State that crosses a border: plain optimizers, distributed checkpoints, other world sizes."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import on_ranks
from test_optimizer_contract import user_groups
from test_optimizer_state import assert_unchanged_by, through_a_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from toy import ToyModel, backward, batch, names, same, train, weights, wrapped

from dynalora_optim import DynamicAllocationOptimizer, LocalLR, Pause


def assert_equal_states(left: Any, right: Any) -> None:
    """Bit for bit, in all parts of two nested state dicts."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert_equal_states(value, right[key])
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


# A plain optimizer's state, in and out

PLAIN = {
    "one group": lambda model: model.parameters(),
    "reversed": lambda model: list(model.parameters())[::-1],
    "two groups": user_groups,
    "named": lambda model: model.named_parameters(),
    "two named groups": lambda model: [
        {
            "params": [(n, p) for n, p in model.named_parameters() if kind in n],
            "name": kind,
            "lr": rate,
        }
        for kind, rate in (("head", 0.01), ("layers", 0.05))
    ],
}
RULES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"amsgrad": True, "lr": torch.tensor(0.02)}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {}),
    (torch.optim.Adafactor, {}),
]


def plain(model, groups="one group", rule=torch.optim.AdamW, **options):
    return rule(PLAIN[groups](model), **{"lr": 0.02, **options})


@pytest.mark.parametrize("groups", PLAIN)
@pytest.mark.parametrize(("rule", "options"), RULES)
def test_a_plain_state_goes_in_and_out_bit_for_bit(groups, rule, options):
    model = ToyModel()
    optimizer = plain(model, groups, rule, **options)
    train(model, optimizer, 3)
    saved = through_a_file(optimizer.state_dict())
    twin = copy.deepcopy(model)
    wrapper = DynamicAllocationOptimizer(
        plain(twin, groups, rule, **options), twin, active=1.0, period=2
    )
    wrapper.load_state_dict(saved)
    assert_equal_states(wrapper.plain_state_dict(), optimizer.state_dict())
    train(model, optimizer, 3, start=3)
    train(twin, wrapper, 3, start=3)
    assert same(weights(model), weights(twin)), "with all groups active it is that optimizer"

    back = copy.deepcopy(twin)
    again = plain(back, groups, rule, **options)
    again.load_state_dict(through_a_file(wrapper.plain_state_dict()))
    train(twin, wrapper, 3, start=6)
    train(back, again, 3, start=6)
    assert same(weights(back), weights(twin)), "and the other way round"


def test_the_allocation_begins_anew_with_a_plain_state():
    fresh, used = ToyModel(), ToyModel()
    reference, optimizer = (
        wrapped(model, active=2, period=2, lr_time="local") for model in (fresh, used)
    )
    train(used, optimizer, 5)
    source = ToyModel(seed=3)
    trained = torch.optim.AdamW(source.parameters(), lr=0.01)
    train(source, trained, 2)
    for model, loading in ((fresh, reference), (used, optimizer)):
        model.load_state_dict(source.state_dict())
        loading.load_state_dict(copy.deepcopy(trained.state_dict()))  # torch shares the tensors
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    assert optimizer.record.state_dict() == reference.record.state_dict()
    assert set(optimizer.tracker.scores().values()) == {0.0}
    train(fresh, reference, 5)
    train(used, optimizer, 5)
    assert same(weights(fresh), weights(used))
    assert optimizer.record.state_dict() == reference.record.state_dict()


def test_modules_that_were_never_active_have_no_plain_state():
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=100)
    train(model, optimizer, 2)
    assert len(optimizer.plain_state_dict()["state"]) == 2 * 2 + 2
    torch.optim.AdamW(model.parameters()).load_state_dict(optimizer.plain_state_dict())


class Counting(torch.optim.SGD):
    """Counts its updates in its param groups, as Prodigy and schedule-free optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_numbers_that_a_plain_group_cannot_hold_are_refused():
    model = ToyModel()
    optimizer = wrapped(model, Counting, active=2, period=1, allocator="round_robin")
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match=r"group 0 has no single value of k: in layers.0.0 it is"):
        optimizer.plain_state_dict()
    train(model, optimizer, 2, start=1)
    with pytest.raises(ValueError, match=r"group 0 has no single value of k: in layers.0.0 it is"):
        optimizer.plain_state_dict()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: plain(ToyModel(), "two groups"), "has 3 param groups.*was given 1"),
        (lambda: plain(ToyModel(layers=5)), r"group 0 of state_dict has 22 param.*given 26"),
        (
            lambda: plain(ToyModel(layers=7), "named"),
            r"missing: none; unexpected: layers.6.0.A, layers.6.0.B, layers.6.0.base.bias",
        ),
        (lambda: plain(ToyModel(features=9)), r"exp_avg of shape \(2, 9\) for layers.0.0.A.*order"),
        (lambda: plain(ToyModel(), "reversed"), r"exp_avg of shape .* for layers.0.0"),
    ],
)
def test_a_plain_state_of_others_is_refused(make, match):
    model = ToyModel()
    other = make()
    for group in other.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    other.step()
    assert_unchanged_by(wrapped(model), model, other.state_dict(), match)


def test_a_state_that_lost_the_allocation_is_not_taken_for_a_plain_one():
    model = ToyModel()
    optimizer = wrapped(model)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["dynalora"]
    assert_unchanged_by(optimizer, model, state, "lacks 'dynalora'")


# torch.distributed.checkpoint

OPTIONS = {
    "sharded": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
    "full on the host": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
RUNS: dict[str, dict[str, Any]] = {
    "default": {"active": 2, "period": 3},
    "local": {"active": 2, "period": 2, "lr_time": "local", "pause": Pause(warmup=2)},
    "momentum": {"active": 2, "period": 3, "rule": torch.optim.SGD},
    "rprop": {"active": 2, "period": 3, "rule": torch.optim.Rprop},
    "smoothed": {"active": 2, "period": 2, "importance": "sensitivity"},
}


def make(run: str, seed: int = 0):
    model = ToyModel(seed=seed)
    options = dict(RUNS[run])
    rule = options.pop("rule", torch.optim.AdamW)
    extra = {"momentum": 0.9} if rule is torch.optim.SGD else {}
    inner = rule(user_groups(model), lr=0.02, **extra)
    return model, DynamicAllocationOptimizer(inner, model, **options)


def assert_goes_on_alike(left, right, steps: int, start: int) -> None:
    for model, optimizer in (left, right):
        train(model, optimizer, steps, start=start)
    assert same(weights(left[0]), weights(right[0]))
    assert left[1].active_groups == right[1].active_groups
    assert left[1].tracker.scores() == right[1].tracker.scores()


@pytest.mark.parametrize("stop", [0, 1, 4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("run", RUNS)
def test_get_and_set_resume_bit_for_bit(run, options, stop):
    model, optimizer = make(run)
    untouched = make(run)
    train(model, optimizer, stop)
    train(*untouched, stop)
    model_state, state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    other, resumed = make(run, seed=4)
    set_model_state_dict(other, model_state, options=options)
    set_optimizer_state_dict(other, resumed, state, options=options)
    assert resumed.active_groups == optimizer.active_groups
    assert_goes_on_alike((model, optimizer), (other, resumed), 5, stop)
    train(*untouched, 5, start=stop)
    assert same(weights(untouched[0]), weights(model)), "taking a checkpoint changes nothing"
    assert untouched[1].record.state_dict() == optimizer.record.state_dict()


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("run", RUNS)
def test_save_and_load_on_disk_resume_bit_for_bit(run, flatten, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = make(run)
    train(model, optimizer, 4)
    saved_model, saved = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": saved_model, "optimizer": saved}, checkpoint_id=tmp_path)
    other, resumed = make(run, seed=4)
    model_state, state = get_state_dict(other, resumed, options=options)
    loaded = {"model": model_state, "optimizer": state}
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(
        other,
        resumed,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=options,
    )
    assert_goes_on_alike((model, optimizer), (other, resumed), 5, 4)


def test_the_initialising_step_is_not_a_step():
    model = ToyModel()
    scheduled = LocalLR(lambda step: 1.0)
    optimizer = wrapped(model, active=2, period=1, lr_time=scheduled, importance="gradient")
    before, record = weights(model), optimizer.record.state_dict()
    options = copy.deepcopy(optimizer.param_groups[0])
    state = get_optimizer_state_dict(model, optimizer)
    assert len(state["state"]) == 6 * 2 + 2, "all state is there to be read or written"
    assert same(weights(model), before)
    assert optimizer.record.state_dict() == record
    assert set(optimizer.tracker.scores().values()) == {0.0}
    assert_equal_states(
        {k: v for k, v in optimizer.param_groups[0].items() if k != "params"},
        {k: v for k, v in options.items() if k != "params"},
    )
    saved = json.loads(optimizer.state_dict()["param_groups"][0]["dynalora"])
    assert saved["steps"] == 0
    assert {module["updates"] for module in saved["modules"].values()} == {0}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert saved["unmaterialized"].keys() == trainable
    assert not optimizer.plain_state_dict()["state"]


def test_a_stateless_rule_can_be_saved_at_any_time():
    model, other = ToyModel(), ToyModel()
    optimizer, reference = (
        wrapped(m, torch.optim.SGD, active=2, period=2, lr=0.05) for m in (model, other)
    )
    for step in range(5):
        get_optimizer_state_dict(model, optimizer)
        train(model, optimizer, 1, start=step)
        train(other, reference, 1, start=step)
    assert same(weights(model), weights(other))
    assert optimizer.record.state_dict() == reference.record.state_dict()


def test_a_warmup_from_zero_counts_from_its_first_step():
    for active in (2, 6):
        model = ToyModel()
        optimizer = wrapped(model, active=active, period=1)
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
        backward(model)
        optimizer.step()
        scheduler.step()
        assert [entry.step for entry in optimizer.record] == [0, 1]
        assert optimizer.tracker.scores()[names()[0]] > 0


def test_flattened_state_into_an_optimizer_in_use_is_refused_rather_than_lost():
    # DCP asks the optimizer in hand which values exist, and drops those of modules without state.
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = make("default")
    train(model, optimizer, 7)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    other, used = make("default")
    train(other, used, 1)
    with pytest.raises(ValueError, match=r"load into a newly built optimizer, call optimizer"):
        set_optimizer_state_dict(other, used, state, options=options)
    other.load_state_dict(model.state_dict())
    used.state.clear()
    set_optimizer_state_dict(other, used, copy.deepcopy(state), options=options)
    assert_goes_on_alike((model, optimizer), (other, used), 5, 7)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_is_read_into_an_optimizer_in_use_once_its_state_is_cleared(tmp_path):
    # Zeros that stand in for states to come take the room of one: nothing can be read into them.
    model, optimizer = make("default")
    train(model, optimizer, 4)
    dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=tmp_path)
    kept = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy((model, optimizer))
    train(model, optimizer, 1, start=4)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(dcp.api.CheckpointException, match="single memory location"):
        dcp.load(get_optimizer_state_dict(model, optimizer), checkpoint_id=tmp_path)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    optimizer.state.clear()
    state = get_optimizer_state_dict(model, optimizer)
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(model, optimizer, state)
    model.load_state_dict(kept)
    assert_goes_on_alike(expected, (model, optimizer), 5, 4)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("lost", ["*.distcp", ".metadata"])
def test_a_folder_that_was_not_finished_is_refused_and_nothing_is_loaded(lost, tmp_path):
    model, optimizer = make("default")
    train(model, optimizer, 4)
    dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=tmp_path)
    for path in tmp_path.glob(lost):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    other, resumed = make("default", seed=4)
    untouched = make("default", seed=4)
    with pytest.raises((dcp.api.CheckpointException, EOFError, pickle.UnpicklingError)):
        dcp.load(get_optimizer_state_dict(other, resumed), checkpoint_id=tmp_path)
    assert_goes_on_alike(untouched, (other, resumed), 4, 0)


def test_a_plain_state_comes_in_through_dcp():
    model = ToyModel()
    trained = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, trained, 3)
    state = get_optimizer_state_dict(model, trained)
    twin = copy.deepcopy(model)
    optimizer = wrapped(twin, active=1.0)
    set_optimizer_state_dict(twin, optimizer, copy.deepcopy(state))
    train(model, trained, 3, start=3)
    train(twin, optimizer, 3, start=3)
    assert same(weights(model), weights(twin))


# Several processes


def ddp_rows(step: int, rank: int | None) -> torch.Tensor:
    parts = [batch(2 * step + r) for r in range(2)]
    return torch.cat(parts).double() if rank is None else parts[rank].double()


def train_rows(model, optimizer, rank, start: int, stop: int) -> None:
    for step in range(start, stop):
        model(ddp_rows(step, rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def train_and_save(rank, folder, start: int = 0, stop: int = 8, save: int | None = None):
    """Train from ``start``, loaded from the folder, to ``stop``; write the folder at ``save``."""
    options = StateDictOptions(flatten_optimizer_state_dict=False)
    module = ToyModel(seed=start).double()
    optimizer = wrapped(module, active=2, period=3, lr=0.02)
    model = module if rank is None else DistributedDataParallel(module)
    if start:
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    train_rows(model, optimizer, rank, start, stop if save is None else save)
    if save is not None:
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }
        dcp.save(state, checkpoint_id=folder)
        train_rows(model, optimizer, rank, save, stop)
    return weights(module), [(entry.step, entry.chosen) for entry in optimizer.record]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders written in step 4 on two ranks and on one, and how the runs went on."""
    two, one = (str(tmp_path_factory.mktemp(name)) for name in ("two", "one"))
    straight = on_ranks(train_and_save, two, 0, 8, 4)
    return two, one, straight, train_and_save(None, one, 0, 8, 4)


def assert_resumed(found, expected, *, exact: bool) -> None:
    (weights_found, chosen), (weights_expected, all_chosen) = found, expected
    assert [entry for entry in chosen if entry[0] > 4] == [e for e in all_chosen if e[0] > 4]
    for name, value in weights_expected.items():
        torch.testing.assert_close(weights_found[name], value, atol=0 if exact else 1e-9, rtol=0)


@pytest.mark.distributed
def test_two_ranks_resume_on_two_and_on_one(saved):
    two, _, straight, _ = saved
    for found, expected in zip(on_ranks(train_and_save, two, 4, 8), straight, strict=True):
        assert_resumed(found, expected, exact=True)
    assert_resumed(train_and_save(None, two, 4, 8), straight[0], exact=False)


@pytest.mark.distributed
def test_one_process_resumes_on_two_ranks(saved):
    _, one, _, straight = saved
    for found in on_ranks(train_and_save, one, 4, 8):
        assert_resumed(found, straight, exact=False)
