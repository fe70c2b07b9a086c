"""Damaged state dicts: whatever is wrong with one, it loads, or is refused and changes nothing."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kinds import Blocks
from toy import ToyModel, same, train, weights, wrapped

from dynalora_optim import (
    Budget,
    DynamicAllocationOptimizer,
    Ema,
    GradientNorm,
    ImportanceTracker,
)

PACKED = "dynalora"


def toy(**options: Any) -> tuple[torch.nn.Module, DynamicAllocationOptimizer]:
    model = ToyModel(3)
    return model, wrapped(model, **{"active": 1, "period": 2, **options})


def budgeted(**options: Any) -> tuple[torch.nn.Module, DynamicAllocationOptimizer]:
    torch.manual_seed(0)
    model = Blocks()
    allocator = Budget(**{"memory": 0.8, "compute": 0.9, **options})
    return model, wrapped(model, period=2, allocator=allocator)


RUNS: dict[str, Callable[[], tuple[torch.nn.Module, DynamicAllocationOptimizer]]] = {
    "forward": toy,
    "local": lambda: toy(lr_time="local", importance="sensitivity"),
    "probe": lambda: toy(importance=ImportanceTracker(GradientNorm(), window=Ema(0.5), probe=True)),
    "budget": budgeted,
}


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def saved(run: str, steps: int = 3) -> dict[str, Any]:
    model, optimizer = RUNS[run]()
    train(model, optimizer, steps)
    return through_a_file(optimizer.state_dict())


SAVED = {run: saved(run) for run in RUNS}


def decoded(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with the packed values as a tree, to be changed."""
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        group[PACKED] = json.loads(group[PACKED])
    return state


def encoded(state: Any) -> Any:
    """Undo `decoded`, as far as it can be undone."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    for group in groups if isinstance(groups, list) else ():
        if isinstance(group, dict) and not isinstance(group.get(PACKED, ""), str):
            group[PACKED] = json.dumps(group[PACKED])
    return state


def fingerprint(optimizer: DynamicAllocationOptimizer) -> Any:
    state = optimizer.state_dict()
    tensors = {
        (key, name): value.tolist() if isinstance(value, torch.Tensor) else value
        for key, values in state["state"].items()
        for name, value in values.items()
    }
    return state["param_groups"], state["record"], tensors, optimizer.active_groups


def loads_or_is_refused(run: str, state: Any) -> bool:
    """Load ``state`` and train on; where it is refused, the run must be as if it had not been."""
    model, optimizer = RUNS[run]()
    train(model, optimizer, 1)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    before = fingerprint(optimizer)
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        assert "state_dict" in str(error)  # noqa: PT017
        assert fingerprint(optimizer) == before
        for pair in ((model, optimizer), (twin, twin_optimizer)):
            train(*pair, 3, start=1)
        assert same(weights(model), weights(twin))
        return False
    train(model, optimizer, 3)
    assert sum(optimizer.tracker.importance().values()) == pytest.approx(1)
    through_a_file(optimizer.state_dict())
    return True


plain_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(10**30), 10**400]),
    st.floats(width=32),
    st.text(max_size=3),
    st.just([]),
    st.just({}),
    st.lists(st.integers(-1, 4) | st.floats(width=32) | st.text(max_size=2), max_size=3),
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree of dicts and lists."""
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        return [path]
    inner = [place for key, item in items for place in places(item, (*path, key))]
    return ([path] if path else []) + inner


def change(tree: Any, path: tuple[Any, ...], how: str, value: Any) -> None:
    *way, key = path
    for step in way:
        tree = tree[step]
    if how == "replace":
        tree[key] = value
    elif how == "delete":
        del tree[key]
    elif isinstance(tree, list):
        tree.append(copy.deepcopy(tree[key]))
    else:
        tree[f"{key}2"] = tree.pop(key)


def of_the_allocation(path: tuple[Any, ...]) -> bool:
    """Whether torch's own checks leave this place to us."""
    return path[0] == "record" or PACKED in path or len(path) < 3 or path[2] in ("params", "name")


@pytest.mark.parametrize("run", RUNS)
@given(data=st.data())
def test_any_change_to_a_state_dict_is_loaded_or_refused_whole(run, data):
    state = decoded(SAVED[run])
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(filter(of_the_allocation, places(state)))))
        how = data.draw(st.sampled_from(["replace", "delete", "other"]))
        change(state, path, how, data.draw(plain_values))
    loads_or_is_refused(run, encoded(state))


@pytest.mark.parametrize("run", RUNS)
def test_without_any_one_of_its_parts_a_state_dict_is_refused(run):
    paths = [p for p in places(decoded(SAVED[run])) if PACKED in p and len(p) in (4, 6)]
    paths = [p for p in paths if len(p) == 4 or p[3] == "modules"]
    paths = [p for p in paths if p[3] not in ("costs", "loop")]  # None without a budget
    paths = [p for p in paths if p[-1] != "reached"]  # files of older versions lack it
    assert len(paths) > 20
    for path in paths:
        state = decoded(SAVED[run])
        change(state, path, "delete", None)
        assert not loads_or_is_refused(run, encoded(state)), path


@given(text=st.text(max_size=20) | st.sampled_from(["[" * 10**5, '{"a":' * 10**5, "NaN", "1"]))
def test_any_packed_text_is_refused(text):
    state = copy.deepcopy(SAVED["forward"])
    state["param_groups"][0][PACKED] = text
    assert not loads_or_is_refused("forward", state)


def at(*path: Any, value: Any) -> Callable[[], dict[str, Any]]:
    def spoil() -> dict[str, Any]:
        state = decoded(SAVED["forward"])
        change(state, path, "replace", value)
        return encoded(state)

    return spoil


def nobody_active() -> dict[str, Any]:
    state = decoded(SAVED["forward"])
    for module in state["param_groups"][0][PACKED]["modules"].values():
        module["active"] = False
    return encoded(state)


SPOILT: dict[str, tuple[Callable[[], Any], str]] = {
    "empty": (dict, "state_dict is damaged.*no mapping 'state'"),
    "no dict": (lambda: 3, "state_dict is damaged"),
    "not JSON": (
        at("param_groups", 0, PACKED, value="{"),
        "is damaged.*JSONDecodeError",
    ),
    "negative steps": (at("param_groups", 0, PACKED, "steps", value=-1), r"steps=-1 in .* group 0"),
    "too many active": (
        at("param_groups", 0, PACKED, "active_setting", value=9),
        "active=9 exceeds the 3 adapter groups",
    ),
    "nobody active": (nobody_active, "no active module group"),
    "a score too many": (
        at("param_groups", 0, PACKED, "modules", "layers.1.0", "window", value=[1.0, 2.0]),
        "2 values for the score of layers.1.0, but its window holds 1",
    ),
    "no record": (at("record", value="x"), "record of kind str"),
    "foreign choice": (at("record", 0, "chosen", value=["x"]), "entry 0 has no score of a ch"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_the_message_says_what_is_wrong(case):
    spoil, message = SPOILT[case]
    _, optimizer = toy()
    before = fingerprint(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(spoil())
    assert fingerprint(optimizer) == before


def test_a_choice_that_exceeds_the_budget_is_refused_before_anything_changes():
    model, optimizer = budgeted(memory=1.0, compute=None)
    train(model, optimizer, 1)
    least = optimizer.memory_report().current.peak
    _, smaller = budgeted(memory=least - 1, compute=None)
    before = fingerprint(smaller)
    with pytest.raises(ValueError, match="cannot hold a"):
        smaller.load_state_dict(optimizer.state_dict())
    assert fingerprint(smaller) == before


@pytest.mark.parametrize("error", [AttributeError, TypeError, KeyError])
def test_an_error_of_the_wrapped_optimizer_is_not_called_damage(error):
    """The state is as it was saved; what fails is a class that cannot load it."""

    class Broken(torch.optim.AdamW):
        def load_state_dict(self, state_dict: Any) -> None:
            raise error("exp_avg")

    model = ToyModel(3)
    optimizer = wrapped(model, Broken, active=1, period=2)
    train(model, optimizer, 3)
    before, state = fingerprint(optimizer), through_a_file(optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"wrapped Broken raised {error.__name__}: .*exp_avg"):
        optimizer.load_state_dict(state)
    assert fingerprint(optimizer) == before


@pytest.mark.parametrize("error", [AttributeError, TypeError])
def test_an_error_of_our_own_is_not_called_damage(error, monkeypatch):
    model, optimizer = toy()
    train(model, optimizer, 3)
    state = optimizer.state_dict()

    def broken(*_: Any, **__: Any) -> None:
        raise error("a mistake in this package")

    monkeypatch.setattr(type(optimizer.tracker), "check_state", broken)
    with pytest.raises(error, match="a mistake in this package"):
        optimizer.load_state_dict(state)
