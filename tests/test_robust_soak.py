"""Long runs, threads, workers, and optimizers thrown away: nothing is mixed up or left behind."""

from __future__ import annotations

import copy
import gc
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS, Blocks, Foreign, decided, foreign_groups, hooks, made
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset
from toy import backward, batch, living_tensors, same, train, weights, wrapped

from dynalora_optim import Budget, DynamicAllocationOptimizer, ImportanceTracker

# Threads and workers


def test_threads_that_train_other_models_change_nothing():
    def run(pairs: dict[str, Any], start: Callable[[Callable[[], None]], None]) -> Any:
        for model, optimizer in pairs.values():
            start(lambda model=model, optimizer=optimizer: train(model, optimizer, 40))
        return pairs

    def in_a_thread(task: Callable[[], None]) -> None:
        threads.append(threading.Thread(target=task))
        threads[-1].start()

    threads: list[threading.Thread] = []
    alone = run({kind: made(kind, active=2) for kind in KINDS}, lambda task: task())
    together = run({kind: made(kind, active=2) for kind in KINDS}, in_a_thread)
    for thread in threads:
        thread.join()
    for kind in KINDS:
        (model, optimizer), (threaded, other) = alone[kind], together[kind]
        assert same(weights(model), weights(threaded))
        assert decided(other) == decided(optimizer)


def test_optimizers_can_be_built_and_closed_in_many_threads_at_once():
    errors: list[BaseException] = []

    def build_and_close() -> None:
        try:
            for _ in range(30):
                made("flagged", active=1)[1].close()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=build_and_close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []


class Batches(Dataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, step: int) -> Tensor:
        return batch(step)


@pytest.mark.parametrize("importance", ["forward", "gradient"])
def test_loader_workers_change_nothing(importance):
    def run(workers: int) -> Any:
        model, optimizer = made("foreign", active=2, importance=importance)
        for _ in range(2):
            for x in DataLoader(Batches(), batch_size=None, num_workers=workers):
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return weights(model), decided(optimizer)

    (plain, expected), (loaded, found) = run(0), run(2)
    assert same(plain, loaded)
    assert found == expected


# What is left behind


def budgeted() -> tuple[nn.Module, DynamicAllocationOptimizer]:
    torch.manual_seed(0)
    model = Blocks()
    return model, wrapped(model, period=1, allocator=Budget(memory=0.8, compute=0.9))


PROBE = ImportanceTracker("gradient", probe=True)
LEFT: dict[str, Callable[[], tuple[nn.Module, DynamicAllocationOptimizer]]] = {
    **{kind: partial(made, kind, active=1) for kind in KINDS},
    "probe": lambda: made("foreign", active=1, importance=copy.deepcopy(PROBE)),
    "budget": budgeted,
}


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("kind", LEFT)
def test_an_optimizer_that_is_dropped_leaves_a_model_as_if_it_had_not_been(kind, steps):
    model, optimizer = LEFT[kind]()
    parameters = dict(model.named_parameters())
    train(model, optimizer, steps)
    backward(model)
    del optimizer
    gc.collect()
    assert hooks(model) == 0
    assert all(p is parameters[name] for name, p in model.named_parameters())
    model.zero_grad()
    backward(model)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def small(**options: Any) -> tuple[nn.Module, DynamicAllocationOptimizer]:
    model = nn.Sequential(Foreign(), Foreign())
    return model, wrapped(model, SGD, groups=foreign_groups, active=1, period=1, **options)


STATM = Path("/proc/self/statm")


def soaked(
    model: nn.Module, optimizer: Any, steps: int, others: dict[int, Tensor]
) -> tuple[int, int, int]:
    """The new tensors, the hooks and the bytes of memory after so many more steps."""
    x = batch()
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = len(living_tensors().keys() - others)
    registered = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return tensors, registered, int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not STATM.exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (small, 2000),
        (lambda: small(importance=copy.deepcopy(PROBE)), 600),
        (budgeted, 200),
    ],
    ids=["forward", "probe", "budget"],
)
def test_thousands_of_reallocations_hold_no_more_than_their_record(make, steps):
    model, optimizer = make()
    others = living_tensors()  # held: those of tests before this one cannot go in between
    tensors, registered, memory = soaked(model, optimizer, steps // 5, others)
    after = soaked(model, optimizer, steps - steps // 5, others)
    assert len(optimizer.record) >= steps
    assert after[:2] == (tensors, registered)
    # An entry of the record takes a quarter of a page; what a step computes, many.
    assert after[2] - memory < steps * 2**11 + 2**20
