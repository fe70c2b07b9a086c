"""Schedules: when they are due, and that the clock counts optimizer steps only."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import ToyModel, backward, batch, train, wrapped

from dynalora_optim import Bounded, Once, Periodic
from dynalora_optim.allocation._schedules import as_schedule


@given(st.integers(1, 100), st.integers(1, 1000))
def test_periodic_is_due_after_every_n_steps(n, steps):
    due = [step for step in range(1, steps + 1) if Periodic(n).due(step)]
    assert due == list(range(n, steps + 1, n))


@given(st.integers(1, 100), st.integers(1, 200))
def test_once_is_due_once(at, steps):
    due = [step for step in range(1, steps + 1) if Once(at).due(step)]
    assert due == ([at] if at <= steps else [])


@pytest.mark.parametrize("value", [0, -3, True, 2.0, math.nan])
@pytest.mark.parametrize("schedule", [Periodic, Once])
def test_schedules_refuse_what_is_no_number_of_steps(schedule, value):
    with pytest.raises(ValueError, match=r"whole number of optimizer steps, at least 1"):
        schedule(value)


def test_a_number_stands_for_periodic_and_objects_for_themselves():
    assert as_schedule(50) == Periodic(50)
    assert as_schedule(Once(3)) == Once(3)
    with pytest.raises(ValueError, match=r"period=2\.5"):
        as_schedule(2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="neither a number of steps nor a schedule"):
        as_schedule("50")  # type: ignore[arg-type]


def reallocation_steps(model, period, steps):
    optimizer = wrapped(model, period=period)
    train(model, optimizer, steps)
    return [entry.step for entry in optimizer.record]


def test_the_optimizer_reallocates_when_the_schedule_says():
    assert reallocation_steps(ToyModel(), 3, 10) == [0, 3, 6, 9]
    assert reallocation_steps(ToyModel(), Once(at=4), 10) == [0, 4]


def test_a_users_own_schedule_is_asked_after_each_step():
    asked = []

    class Doubling:
        def due(self, step: int) -> bool:
            asked.append(step)
            return step & (step - 1) == 0

    assert reallocation_steps(ToyModel(), Doubling(), 9) == [0, 1, 2, 4, 8]
    assert asked == list(range(1, 10))


def test_accumulation_evaluation_and_no_grad_do_not_move_the_clock():
    model = ToyModel()
    optimizer = wrapped(model, period=2)
    for step in range(4):
        for micro in range(3):
            backward(model, 3 * step + micro)
        model.eval()
        with torch.no_grad():
            model(batch())
        model.train()
        optimizer.step()
        optimizer.zero_grad()
    assert [entry.step for entry in optimizer.record] == [0, 2, 4]


def test_a_step_that_the_grad_scaler_skips_does_not_move_the_clock():
    model = ToyModel()
    optimizer = wrapped(model, period=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for step in range(6):
        loss = model(batch(step)).square().mean()
        if step in (1, 2):
            loss = loss * math.inf
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert [entry.step for entry in optimizer.record] == [0, 2, 4]
    assert sum(optimizer.record.counts().values()) == 4 * len(optimizer.active_groups)


@given(st.integers(0, 6), st.integers(1, 4), st.integers(0, 15))
def test_warmup_keeps_all_active_then_the_schedule_begins(warmup, period, steps):
    model = ToyModel()
    optimizer = wrapped(model, period=Periodic(period, warmup=warmup), active=2)
    for step in range(steps):
        assert len(optimizer.active_groups) == (6 if step < warmup else 2)
        train(model, optimizer, 1, start=step)
    after = [step for step in range(warmup, steps + 1) if (step - warmup) % period == 0]
    assert [entry.step for entry in optimizer.record] == sorted({0, *after})


def test_max_idle_periods_holds_in_a_run():
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=1, allocator=Bounded("topk", 3))
    train(model, optimizer, 20)
    for start in range(len(optimizer.record) - 3):
        window = [name for entry in optimizer.record[start : start + 4] for name in entry.chosen]
        assert set(window) == set(optimizer.groups)
    with pytest.raises(ValueError, match="cannot be kept with 1 of 6"):
        optimizer.active = 1
