"""The budget in the loops that users have: accumulation, several forwards, ragged rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from budgets import adapted, clear, gradients, on_budget
from kinds import Blocks as SmallBlocks
from tiny_models import ROOMY, TinyModel, build
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from toy import backward, same, weights, wrapped

from dynalora_optim import Blocks, Budget, DynamicAllocationOptimizer, LiveBytes

WIDE = replace(ROOMY, rows=8)
Loop = Callable[[TinyModel, DynamicAllocationOptimizer | None], None]


def rows(tiny: TinyModel, count: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch of this shape."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 60, (count, length), generator=generator)
    labels = torch.zeros(count, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step(optimizer: DynamicAllocationOptimizer | None, tiny: TinyModel) -> None:
    if optimizer:
        optimizer.step()
        optimizer.zero_grad()
    else:
        clear(tiny)


def plain(tiny: TinyModel, optimizer: Any) -> None:
    tiny.loss().backward()
    step(optimizer, tiny)


def accumulated(tiny: TinyModel, optimizer: Any) -> None:
    for _ in range(3):
        (tiny.loss() / 3).backward()
    step(optimizer, tiny)


def output_kept(tiny: TinyModel, optimizer: Any) -> None:
    output = tiny.model(**tiny.batch)
    output.loss.backward()
    step(optimizer, tiny)
    assert output.logits is not None


def zeroed_late(tiny: TinyModel, optimizer: Any) -> None:
    loss = tiny.loss()
    clear(tiny)
    loss.backward()
    if optimizer:
        optimizer.step()


def two_towers(tiny: TinyModel, optimizer: Any) -> None:
    one, other = tiny.model(**tiny.batch).logits, tiny.model(**tiny.batch).logits
    (one - 2 * other).square().mean().backward()
    step(optimizer, tiny)


def triplet(tiny: TinyModel, optimizer: Any) -> None:
    a, b, c = (tiny.model(**tiny.batch).logits for _ in range(3))
    ((a - 2 * b).square() - (a - 3 * c).square()).mean().backward()
    step(optimizer, tiny)


def kept_for_a_metric(tiny: TinyModel, optimizer: Any) -> None:
    seen = []
    for _ in range(2):
        output = tiny.model(**tiny.batch)
        output.loss.backward()
        seen.append(output.logits.detach())
    step(optimizer, tiny)
    assert torch.cat(seen).isfinite().all()


def pairs_accumulated(tiny: TinyModel, optimizer: Any) -> None:
    """Autograd keeps the sums of the pair's gradients beside those that were accumulated."""
    for _ in range(2):
        one, other = tiny.model(**tiny.batch).logits, tiny.model(**tiny.batch).logits
        (one - 2 * other).square().mean().backward()
    step(optimizer, tiny)


def losses_apart(tiny: TinyModel, optimizer: Any) -> None:
    """The second graph waits while the first backward runs, and then the gradients are alive."""
    one, other = tiny.loss(), tiny.loss()
    one.backward()
    (2 * other).backward()
    step(optimizer, tiny)


LOOPS = [plain, accumulated, output_kept, zeroed_late, two_towers, triplet, kept_for_a_metric]
LOOPS += [pairs_accumulated, losses_apart]


def peak_of(loop: Loop, tiny: TinyModel, optimizer: Any, steps: int) -> Iterator[int]:
    """The most bytes alive in each step of a loop, in addition to what was there before it."""
    with LiveBytes() as memory:
        for _ in range(steps):
            memory.restart()
            loop(tiny, optimizer)
            yield memory.peak


def made(name: str, how: str) -> TinyModel:
    if how == "blocks":
        tiny = build(name, sizes=WIDE)
        tiny.model.train()
        return tiny
    return adapted(name, how, sizes=WIDE)


def unshaped_peak(loop: Loop, name: str, how: str) -> int:
    return max(peak_of(loop, made(name, how), None, 3))


@pytest.mark.parametrize("memory", [0.75, 0.45])
@pytest.mark.parametrize("how", ["ours", "blocks"])
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_no_step_of_any_loop_exceeds_the_budget(loop, name, how, memory):
    limit = round(memory * unshaped_peak(loop, name, how))
    tiny = made(name, how)
    options = {"groups": Blocks(outside="frozen")} if how == "blocks" else {}
    optimizer = on_budget(tiny, Budget(memory=limit, base="random"), period=1, **options)
    peaks = list(peak_of(loop, tiny, optimizer, 12))
    assert max(peaks) <= limit
    assert len({entry.chosen for entry in optimizer.record}) > 1


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_share_is_of_the_whole_step_with_all_active(loop, name):
    tiny = made(name, "ours")
    optimizer = on_budget(tiny, Budget(memory=0.6), period=1)
    peaks = list(peak_of(loop, tiny, optimizer, 8))
    limit = optimizer.allocator.limit(optimizer._allocation.costs)
    whole = unshaped_peak(loop, name, "ours")
    assert max(peaks) <= 0.6 * whole
    assert 0.55 * whole <= limit <= 0.66 * whole


class Stopped:
    """In the place of an optimizer: it leaves the gradients of a step to be compared."""

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...


@pytest.mark.parametrize("loop", [LOOPS[0], *LOOPS[4:6]], ids=lambda loop: loop.__name__)
def test_gradients_of_what_is_active_are_those_of_the_unshaped_model(loop):
    tiny, unshaped = made("bert", "ours"), made("bert", "ours")
    for one in (tiny, unshaped):
        one.model.double()
    optimizer = on_budget(tiny, Budget(memory=0.5), period=1)
    for _ in range(4):
        loop(tiny, optimizer)
    unshaped.model.load_state_dict(tiny.model.state_dict())
    loop(tiny, Stopped())
    loop(unshaped, Stopped())
    found, want = gradients(tiny), gradients(unshaped)
    assert 0 < len(found) < len(want)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-12, atol=1e-12)


def eager(name: str) -> TinyModel:
    tiny = adapted(name, sizes=replace(ROOMY, length=32))
    tiny.model.set_attn_implementation("eager")
    return tiny


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_longer_rows_with_fewer_elements_are_measured_too(name):
    shapes = [(64, 8), (6, 60), (32, 12), (2, 64), (64, 8), (6, 60)]
    whole = eager(name)
    with LiveBytes() as memory:
        for shape in shapes:
            whole.model(**rows(whole, *shape)).loss.backward()
            clear(whole)
    tiny, limit = eager(name), round(0.5 * memory.peak)
    optimizer = on_budget(tiny, Budget(memory=limit), period=1)
    with LiveBytes() as memory:
        for shape in shapes * 3:
            memory.restart()
            tiny.model(**rows(tiny, *shape)).loss.backward()
            step(optimizer, tiny)
            assert memory.peak <= limit, shape


def test_a_batch_is_planned_by_its_own_shape(monkeypatch):
    """A small batch recomputes nothing that a large one must recompute, and the same trains."""
    tiny = adapted("bert", sizes=WIDE)
    optimizer = on_budget(tiny, Budget(memory=0.6), period=100)
    tiny.loss()
    optimizer.hold(optimizer.groups)
    plans = []
    recompute = optimizer._driver.switch.recompute
    monkeypatch.setattr(
        optimizer._driver.switch,
        "recompute",
        lambda blocks, **of_plan: (
            of_plan and plans.append(blocks),
            recompute(blocks, **of_plan),
        ),
    )
    for number, length in enumerate([32, 32, 32, 8, 32]):
        tiny.model(**rows(tiny, 8, length, number)).loss.backward()
        chosen = optimizer.active_groups
        step(optimizer, tiny)
    assert plans[2], "a large batch needs it"
    assert plans[4] == plans[2]
    assert not plans[3]
    assert optimizer.active_groups == chosen


def test_measuring_ragged_rows_is_rare():
    tiny = adapted("bert")
    optimizer = on_budget(tiny, Budget(memory=0.5), period=50)
    measured = []
    measure = optimizer._costing.measure
    optimizer._costing.measure = lambda *batch: (measured.append(at), measure(*batch))[1]
    generator = torch.Generator().manual_seed(0)
    for at in range(300):
        length = int(torch.randint(4, 64, (), generator=generator))
        tiny.model(**rows(tiny, 4, length, at)).loss.backward()
        step(optimizer, tiny)
    assert len(measured) <= 12
    assert sum(at >= 100 for at in measured) <= 4


def test_gradients_of_the_head_stand_though_those_of_blocks_that_take_turns_are_gone():
    tiny = adapted("bert", sizes=ROOMY)
    optimizer = on_budget(tiny, Budget(memory=10**9), lr=0.0)
    with LiveBytes() as memory:
        tiny.loss().backward()
        optimizer.step()
        for name, parameter in tiny.model.named_parameters():
            if "lora" in name:
                parameter.grad = None
        assert gradients(tiny)
        memory.restart()
        loss = tiny.loss()
        now = optimizer._costing._now
        here, plan = now.here, now.plan
        clear(tiny)  # late
        loss.backward()
    assert memory.peak <= here.peak(plan)
    assert here.peak(plan) > here.in_no_loop().peak(plan)
    assert optimizer._costing._habits.standing


def test_modules_that_join_later_are_measured_with_the_others():
    tiny = made("bert", "ours")
    late = [p for n, p in tiny.model.named_parameters() if ".layer.3." in n and p.requires_grad]
    for parameter in late:
        parameter.requires_grad_(False)
    limit = round(0.6 * unshaped_peak(plain, "bert", "ours"))
    optimizer = on_budget(tiny, Budget(memory=limit, base="random"), period=1)
    peaks = list(peak_of(plain, tiny, optimizer, 4))
    for parameter in late:
        parameter.requires_grad_(True)
    peaks += peak_of(plain, tiny, optimizer, 8)
    assert max(peaks) <= limit
    chosen = {name for entry in optimizer.record for name in entry.chosen}
    assert any(".layer.3." in name for name in chosen)
    assert len(optimizer._costing._habits.pattern[0].group_blocks) == len(optimizer.groups)


def test_a_batch_is_not_refused_because_a_larger_one_would_be():
    """The larger one was measured for a budget that it exceeds; the smaller one fits."""
    tiny = adapted("bert", sizes=WIDE)
    limit = round(0.5 * unshaped_peak(plain, "bert", "ours"))
    optimizer = on_budget(tiny, Budget(memory=limit, base="random"), period=1)
    large = rows(tiny, 64, 32)
    for number in range(6):
        if number in (0, 3):
            with pytest.raises(ValueError, match="cannot hold a step"):
                tiny.model(**large)
        with LiveBytes() as memory:
            plain(tiny, optimizer)
            tiny.model(**rows(tiny, 4, 16)).loss.backward()
            step(optimizer, tiny)
        assert memory.peak <= limit


def whole_peak(batch: dict[str, Tensor]) -> int:
    tiny = adapted("bert", sizes=ROOMY)
    with LiveBytes() as memory:
        tiny.model(**batch).loss.backward()
    return memory.peak


def test_a_share_is_of_the_batch_measured_in_advance():
    """Short rows come first, but the share is of long ones; and these are not measured again."""
    tiny = adapted("bert", sizes=ROOMY)
    short, long = rows(tiny, 4, 10), rows(tiny, 4, 64)
    limit = 0.45 * whole_peak(long)
    optimizer = on_budget(tiny, Budget(memory=0.45, base="random"), period=1)
    before = torch.get_rng_state(), {n: v.clone() for n, v in tiny.model.state_dict().items()}
    optimizer.measure(**long)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(torch.equal(v, before[1][n]) for n, v in tiny.model.state_dict().items())
    assert not gradients(tiny)
    assert not any(entry.step for entry in optimizer.record)

    measured = []
    measure = optimizer._costing.measure
    optimizer._costing.measure = lambda *batch: (measured.append(batch), measure(*batch))[1]
    for number in range(12):
        batch = [short, long, rows(tiny, 4, 50)][number % 3]
        with LiveBytes() as memory:
            tiny.model(**batch).loss.backward()
            step(optimizer, tiny)
        assert memory.peak <= limit
        allowed = optimizer.allocator.limit(optimizer._allocation.costs)
        assert 0.9 * limit <= allowed <= 1.1 * limit
    assert len(measured) == 1, "short rows, which recompute less by their own costs"
    assert len({entry.chosen for entry in optimizer.record}) > 1


def test_a_batch_that_no_plan_holds_is_refused_in_advance():
    tiny = adapted("bert")
    limit = whole_peak(rows(tiny, 4, 32))
    optimizer = on_budget(tiny, Budget(memory=limit), period=1)
    with pytest.raises(ValueError, match="cannot hold a step"):
        optimizer.measure(**rows(tiny, 64, 64))
    for _ in range(3):
        with LiveBytes() as memory:
            plain(tiny, optimizer)
        assert memory.peak <= limit
    with pytest.raises(ValueError, match="cannot hold a step"):
        optimizer.measure(**rows(tiny, 64, 64))
    plain(tiny, optimizer)


def test_a_run_is_the_same_if_its_first_batch_was_measured_in_advance():
    """Bit for bit, and so is a run that goes on from a state saved between the two."""
    ends = []
    for how in ("as it comes", "in advance", "resumed"):
        torch.manual_seed(0)
        tiny = adapted("bert")
        options = {"period": 2, "rule": torch.optim.AdamW}
        optimizer = on_budget(tiny, Budget(memory=0.5, base="random"), **options)
        if how != "as it comes":
            optimizer.measure(**tiny.batch)
        if how == "resumed":
            state = optimizer.state_dict()
            optimizer.close()
            optimizer = on_budget(tiny, Budget(memory=0.5, base="random"), **options)
            optimizer.load_state_dict(state)
        for _ in range(8):
            plain(tiny, optimizer)
        ends.append((list(optimizer.record), tiny.model.state_dict()))
    for record, end in ends[1:]:
        assert record == ends[0][0]
        assert all(torch.equal(value, ends[0][1][name]) for name, value in end.items())


def test_only_training_is_measured_in_advance():
    tiny = adapted("bert")
    optimizer = on_budget(tiny)
    tiny.model.eval()
    with pytest.raises(RuntimeError, match=r"measure\(\) measures training: call model.train"):
        optimizer.measure(**tiny.batch)
    other = adapted("bert")
    inner = torch.optim.SGD(other.model.parameters(), lr=0.01)
    DynamicAllocationOptimizer(inner, other.model).measure("not even a batch")


class Checkpointing(SmallBlocks):
    """Checkpoints its blocks itself, where no switch of the budget's reaches."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_(self.use_reentrant)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_that_a_model_sets_itself_are_refused_with_the_remedy(use_reentrant):
    torch.manual_seed(0)
    model = Checkpointing(use_reentrant)
    optimizer = wrapped(model, period=1, allocator=Budget(memory=0.9))
    before = weights(model)
    with pytest.raises(ValueError, match=r"calls torch\.utils\.checkpoint.*Remove these"):
        backward(model)
    assert same(weights(model), before)
    optimizer.close()
    backward(model)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
