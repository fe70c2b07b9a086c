"""`Bounded(Budget(...), n)`: no block waits for more than n selections, within the budget.

Numbers only, but for the runs at the end.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from budgets import adapted, clear, costs_of, in_blocks, measured, on_budget
from hypothesis import given
from hypothesis import strategies as st
from test_budget import any_costs, context, every_plan, layered
from test_budget_runs import run, saved_and_loaded
from tiny_models import TINY, TinyModel
from toy import same, weights

from dynalora_optim import AllocationContext, Bounded, Budget, TopK
from dynalora_optim.allocation import CostAware, Covering
from dynalora_optim.allocation._costs import BlockCost, BlockUses, Costs, Plan, Use
from dynalora_optim.allocation._cover import covering_plans, shares

DRAWN = ("discounted", "stochastic", "random")


def alike(blocks: int, gradients: int, *, pinned: tuple[int, ...] = ()) -> Costs:
    """Costs of alike blocks; the larger the gradients, the fewer of them fit at once."""
    costs = layered(blocks, pinned=pinned)
    block = replace(costs.blocks[0], gradients=gradients)
    return replace(costs, blocks=(block,) * blocks)


def full_training(blocks: int, gradients: int) -> Costs:
    """The same, where a block that does not train saves half of its backward pass."""
    costs = alike(blocks, gradients)
    idle = BlockUses(Use(48, 38, 58, 58, 10, 4), Use(48, 4, 96, 96, 20, 4))
    return replace(costs, blocks=(replace(costs.blocks[0], idle=idle),) * blocks)


@st.composite
def alike_costs(draw: Any) -> Costs:
    """Costs of alike blocks of which few or many fit at once."""
    blocks, gradients = draw(st.integers(2, 7)), draw(st.sampled_from([1, 20, 40, 60]))
    pinned = draw(st.sampled_from([(), (), (blocks - 1,), (blocks // 2,)]))
    costs = alike(blocks, gradients, pinned=pinned)
    return draw(st.just(costs) | st.just(full_training(blocks, gradients)))


def at_start(costs: Costs, **options: Any) -> AllocationContext:
    return context(costs, idle=(0,) * len(costs.group_blocks), **options)


def least_bound(message: str) -> int | None:
    """The bound that the message of a refusal names."""
    found = re.search(r"at least max_idle_periods=(\d+)", message)
    return int(found[1]) if found else None


def refused(budget: Budget, costs: Costs, bound: int = 1) -> str | None:
    """Why the bound cannot be kept with this budget; None if it can."""
    try:
        Bounded(budget, bound).select(at_start(costs))
    except ValueError as error:
        return str(error)
    return None


@dataclass
class Simulated:
    """What came of many selections.

    Attributes:
        longest: The most selections in a row that left a module out.
        excess: The compute of all selections beyond the bound on their mean, in backward passes.
        forced: In how many selections something had to be active.
    """

    longest: int
    excess: float
    forced: int


def simulated(bounded: Any, costs: Costs, selections: int, seed: int = 0) -> Simulated:
    """Select many times with changing scores; the memory holds, and what must be active is."""
    budget, whole = bounded.allocator, costs.flops(costs.all_active)
    groups, draws = range(len(costs.group_blocks)), random.Random(seed)
    idle, updates, spent = [0] * len(groups), [0] * len(groups), 0.0
    found = Simulated(0, 0.0, 0)
    for turn in range(selections):
        now = context(
            costs,
            tuple(draws.choice([0.0, 1.0, 100.0, 1e6]) for _ in groups),
            tuple(updates),
            seed=seed * 1000 + turn,
            reallocation=turn,
            mean_compute=spent / max(turn, 1),
            idle=tuple(idle),
        )
        must = bounded._with_due(now).must
        chosen = bounded.select(now)
        assert set(must) <= set(chosen)
        plan = bounded.plan(costs, chosen)
        assert costs.peak(plan) <= budget.limit(costs)
        spent += costs.flops(plan) / whole
        idle = [0 if g in chosen else n + 1 for g, n in enumerate(idle)]
        updates = [n + (g in chosen) for g, n in enumerate(updates)]
        found.longest = max(found.longest, *idle)
        found.forced += bool(must)
    found.excess = spent - selections * (budget.compute or math.inf)
    return found


def turns_beyond(costs: Costs, budget: Budget) -> float:
    """What one turn of each set takes beyond the bound: what can be owed at any time."""
    if budget.compute is None:
        return 0.0
    turns = shares(costs, covering_plans(costs, budget.limit(costs)))
    return sum(max(turn - budget.compute, 0.0) for turn in turns)


# The bound, the memory and the compute, together


def hold_together(costs: Costs, budget: Budget, more: int, seed: int) -> None:
    """With the least bound that is not refused, or one that is ``more``, all bounds are kept."""
    bound = 1
    if message := refused(budget, costs):
        least = least_bound(message)
        if least is None:  # no bound at all: with this budget some module could never train
            assert "pass at least" in message
            return
        assert refused(budget, costs, least) is None
        assert least == 1 or least_bound(refused(budget, costs, least - 1) or "") == least
        bound = least
    bound += more
    if bound > 30:
        return
    found = simulated(Bounded(budget, bound), costs, max(60, 3 * bound), seed)
    assert found.longest <= bound
    if budget.compute is None or budget.base == TopK():
        assert found.excess <= 0
    else:  # what was spent just now, which the next selections compensate for
        assert found.excess <= 4 + turns_beyond(costs, budget)


memories = st.floats(0.3, 1.0) | st.integers(60, 400)
computes = st.none() | st.floats(0.2, 1.2)
further = st.sampled_from([0, 0, 1, 4])
seeds = st.integers(0, 1000)


@given(alike_costs(), memories, computes, st.sampled_from([*DRAWN, "topk"]), further, seeds)
def test_no_block_waits_longer_and_no_step_takes_more(costs, memory, compute, base, more, seed):
    hold_together(costs, Budget(memory, compute, base), more, seed)


def test_what_no_plan_of_different_forwards_holds_is_refused_by_the_least_that_would_do():
    nothing = Use(0, 0, 0, 0, 1)
    idle = BlockUses(nothing, nothing)
    alone = replace(layered(1), blocks=(BlockCost(idle, idle, idle, 0, 0),), group_blocks=(0, None))
    alone = replace(alone, head=nothing, forward_base=40, backward_base=0, entry=0)
    lowest = replace(idle, full=Use(0, 0, 33, 0, 1))
    larger = replace(alone, blocks=(replace(alone.blocks[0], lowest=lowest),), head_gradients=12)
    costs = alone.in_loop(carried=16, followers=(larger,))
    least = min(map(costs.peak, every_plan(costs, frozenset({0}))))
    for limit in range(1, least + 3):
        message = refused(Budget(limit), costs)
        if limit >= least:
            assert message is None
        else:
            assert f"or {least} bytes" in message


@given(any_costs(), memories, computes, st.sampled_from([*DRAWN, "topk"]), further, seeds)
def test_the_same_with_any_costs(costs, memory, compute, base, more, seed):
    """With such costs the FLOPs of a draw depend on the importances: only topk bounds them."""
    hold_together(costs, Budget(memory, compute if base == "topk" else None, base), more, seed)


@pytest.mark.parametrize("base", DRAWN)
@pytest.mark.parametrize(
    ("costs", "memory", "compute"),
    [
        (alike(6, 2), 0.5, 0.45),
        (alike(6, 2), 0.8, 0.6),
        (alike(6, 40), 0.5, 0.5),
        (full_training(6, 40), 0.5, 0.4),
        (full_training(5, 60), 0.6, 0.6),
    ],
)
def test_the_mean_keeps_to_compute_with_the_least_bound_over_a_long_run(
    base, costs, memory, compute
):
    """An excess that grew by 1% of a step would be 4 passes more here."""
    budget = Budget(memory, compute, base)
    bound = least_bound(refused(budget, costs) or "") or 1
    found = simulated(Bounded(budget, bound), costs, 400)
    assert found.longest <= bound
    assert found.excess <= 2 + turns_beyond(costs, budget)
    assert found.forced > 400 / (bound + 1) / 2, "the bound does something here"


def test_without_a_bound_blocks_do_wait_longer():
    costs, budget = alike(8, 2), Budget(0.5, 0.6)
    far = simulated(Bounded(budget, 500), costs, 120)
    assert (far.longest > 16, far.forced) == (True, 0)
    assert simulated(Bounded(budget, 8), costs, 120).longest <= 8


# What is refused: the least bound


def fewest(costs: Costs, limit: int) -> int:
    """How many plans that fit it takes to train every block, by trying all."""
    fits = {p.active for p in every_plan(costs) if costs.peak(p) <= limit}
    fits = {active for active in fits if costs.route_of(Plan(active))[1] in costs.lowest_blocks()}
    everything = costs.all_active.active
    for count in range(1, len(everything) + 1):
        for some in itertools.combinations(fits, count):
            if frozenset().union(*some) == everything:
                return count
    raise AssertionError("some block never fits")


@pytest.mark.parametrize("gradients", [2, 20, 40, 60, 90])
@pytest.mark.parametrize("blocks", [3, 5])
@pytest.mark.parametrize("pinned", [(), (2,)])
def test_for_alike_blocks_no_smaller_bound_can_be_kept_in_this_memory(blocks, gradients, pinned):
    costs = alike(blocks, gradients, pinned=pinned)
    for memory in (0.5, 0.6, 0.75, 0.9, 1.0):
        message = refused(Budget(memory, base="random"), costs)
        if message and "cannot hold" in message:
            continue
        least = max(fewest(costs, Budget(memory).limit(costs)) - 1, 1)
        assert (least_bound(message) if message else 1) == least


@given(costs=any_costs(), limit=st.integers(60, 400))
def test_for_any_blocks_each_set_fits_and_together_they_are_all(costs, limit):
    plans = covering_plans(costs, limit)
    assert all(costs.peak(plan) <= limit for plan in plans)
    assert [*map(costs.flops, plans)] == sorted(map(costs.flops, plans))
    fits = [p for p in every_plan(costs) if costs.peak(p) <= limit]
    can_train = frozenset().union(
        *(p.active for p in fits if costs.route_of(p)[1] in costs.lowest_blocks())
    )
    trained = costs.pinned.union(*(plan.active for plan in plans))
    assert can_train <= trained <= can_train | costs.pinned


def test_a_bound_that_takes_too_much_memory_or_compute_names_the_least():
    costs = alike(6, 40)
    assert refused(Budget(0.5), costs, 2) == (
        "max_idle_periods=2 cannot be kept with Budget(memory=0.5, compute=None): it takes 5 "
        "choices that fit to activate every module once; pass at least max_idle_periods=4."
    )
    message = refused(Budget(0.5, 0.5), costs, 4)
    assert re.fullmatch(
        r"max_idle_periods=4 cannot be kept with Budget\(memory=0.5, compute=0.5\): to activate "
        r"every module once in 5 selections costs more; pass at least max_idle_periods=\d+ or "
        r"compute=0\.\d+\.",
        message or "",
    )
    compute = float(re.search(r"compute=(0\.\d+)\.$", message or "")[1])
    assert refused(Budget(0.5, compute), costs, 4) is None
    assert refused(Budget(0.5, compute - 0.001), costs, 4)


@pytest.mark.parametrize("base", ["random", "topk"])
def test_compute_for_which_no_bound_is_long_enough(base):
    message = refused(Budget(0.9, 0.1, base), alike(5, 2), 50)
    assert least_bound(message or "") is None
    compute = float(re.search(r"pass at least (\d\.\d+)\.$", message or "")[1])
    assert refused(Budget(0.9, compute + 0.01, base), alike(5, 2), 400) is None


def test_with_topk_each_set_keeps_to_compute_itself():
    """Block 0 takes the whole backward pass: no other selection makes up for it."""
    costs = alike(5, 2)
    assert "block 0" in (refused(Budget(0.3, 1.0, "topk"), costs) or "")
    assert "compute=0.6" in (refused(Budget(1.0, 0.6, "topk"), costs) or "")
    found = simulated(Bounded(Budget(1.0, 1.0, "topk"), 3), costs, 60)
    assert (found.longest <= 3, found.excess <= 0) == (True, True)


def test_a_block_that_never_fits_beside_one_that_always_trains_is_refused():
    costs, scores = alike(4, 60, pinned=(1,)), (1.0, 1.0, 2.0, 1.0)
    budget = Budget(0.6, base="stochastic")
    with pytest.raises(ValueError, match="cannot hold a step that trains block 3") as error:
        budget.probabilities(context(costs, scores))
    assert re.search(r"cannot hold a step .* pass at least memory", refused(budget, costs) or "")
    least = int(re.search(r"or (\d+) bytes", str(error.value))[1])
    enough = Budget(memory=least, base="stochastic")
    assert min(enough.probabilities(context(costs, scores))) > 0
    assert simulated(Bounded(enough, 6), costs, 60).longest <= 6
    with pytest.raises(ValueError, match="cannot hold a step"):
        Budget(memory=least - 1).probabilities(context(costs, scores))


# What is drawn


@given(costs=any_costs() | alike_costs(), idle=st.integers(0, 3), seed=st.integers(0, 99))
def test_draws_that_need_not_choose_are_those_of_the_budget(costs, idle, seed):
    budget = Budget(1.0, base="stochastic")
    bounded = Bounded(budget, 40)
    if refused(budget, costs, 40):
        return
    waited = (idle,) * len(costs.group_blocks)
    alone, same_draw = (context(costs, idle=waited, seed=seed) for _ in range(2))
    assert bounded.probabilities(alone) == budget.probabilities(alone)
    assert [*bounded.select(alone)] == budget.select(same_draw)


def test_a_set_that_is_due_is_active_and_all_else_that_can_be_may_be():
    costs, budget = alike(6, 40), Budget(0.6, base="random")
    bounded: Any = Bounded(budget, 6)
    due = context(costs, idle=(0, 0, 0, 6, 1, 2))
    (turn,) = [
        plan.active for plan in covering_plans(costs, budget.limit(costs)) if 3 in plan.active
    ]
    found = bounded.probabilities(due)
    assert all(found[block] == pytest.approx(1.0) for block in turn)
    assert found != budget.probabilities(due)
    drawn = [bounded.select(replace(due, generator=random.Random(n))) for n in range(300)]
    for block in range(6):
        often = sum(block in chosen for chosen in drawn) / 300
        assert often == pytest.approx(found[block], abs=0.15)
        assert (often > 0) == (found[block] > 0)


@pytest.mark.parametrize("compute", [None, 0.9])
def test_every_module_keeps_a_probability_where_nothing_is_due(compute):
    costs = alike(5, 20)
    bounded: Any = Bounded(Budget(0.7, compute, floor=0.2), 20)
    least = 0.2 / 5 / (10 if compute else 1)
    assert all(p >= least for p in bounded.probabilities(at_start(costs, scores=(0, 0, 9, 0, 0))))


def test_sets_that_wait_equally_long_go_one_by_one_the_cheapest_first():
    """With the least bound every selection is a turn, and the turns never change again."""
    costs = alike(6, 60)
    budget = Budget(0.5, base="random")
    sets = [plan.active for plan in covering_plans(costs, budget.limit(costs))]
    assert len(sets) > 2
    idle, turns = [0] * 6, []
    for turn in range(2 * len(sets)):
        bounded: Any = Bounded(budget, len(sets) - 1)
        now = context(costs, idle=tuple(idle), seed=turn)
        turns.append(frozenset(bounded._with_due(now).must))
        chosen = bounded.select(now)
        idle = [0 if m in chosen else n + 1 for m, n in enumerate(idle)]
    assert turns == sets * 2


# Costs that grow, and other allocators


def test_costs_that_allow_the_bound_no_more_are_refused_when_they_are_measured():
    small, large = alike(6, 20), alike(6, 60)
    budget = Budget(memory=Budget(0.6).limit(small), base="random")
    bounded: Any = Bounded(budget, 1)
    assert bounded.fitting(small, [3, 4, 5]) == [3, 4, 5]
    assert budget.fitting(large, [5]) == [5]
    with pytest.raises(ValueError, match=r"max_idle_periods=1 cannot be kept.*=2\.$"):
        bounded.fitting(large, [5])


def test_after_costs_have_grown_the_longest_wait_is_the_first_to_end():
    """Sets that were active together and are due together may no longer fit together."""
    costs = alike(6, 60)
    bounded: Any = Bounded(Budget(0.5, base="random"), 7)
    idle, order = [7, 7, 7, 9, 7, 7], []
    for turn in range(8):
        chosen = bounded.select(context(costs, idle=tuple(idle), seed=turn))
        order.append(chosen)
        idle = [0 if m in chosen else n + 1 for m, n in enumerate(idle)]
    assert 3 in order[0]
    assert max(idle) <= 7


class Own:
    """A user's allocator that gets costs: the last module, until others must be active."""

    uses_active = False

    def select(self, context: AllocationContext) -> Collection[int]:
        return context.must or [len(context.scores) - 1]

    def plan(self, costs: Costs, chosen: Collection[int]) -> Plan:
        return Plan(costs.blocks_of(chosen))

    def fitting(self, costs: Costs, chosen: Collection[int]) -> Collection[int]:
        return chosen


class OwnTurns(Own):
    """The same, which also tells what can be active at once."""

    def cover(self, costs: Costs, selections: int) -> list[list[int]]:
        return [[m] for m in range(len(costs.group_blocks))]


def test_any_allocator_can_take_turns():
    costs, bounded = alike(4, 2), Bounded(OwnTurns(), 5)
    idle = [0] * 4
    for turn in range(40):
        chosen = bounded.select(context(costs, idle=tuple(idle), seed=turn))
        idle = [0 if m in chosen else n + 1 for m, n in enumerate(idle)]
        assert max(idle) <= 5


def test_an_allocator_that_knows_no_turns_is_refused():
    with pytest.raises(ValueError, match=r"Bounded\(Own\(...\), 3\).*method cover\(costs, selec"):
        Bounded(Own(), 3)


def test_what_decides_from_costs_says_so_and_nothing_else_does():
    budget, plain = Bounded(Budget(0.5), 3), Bounded("discounted", 3)
    assert isinstance(budget, CostAware)
    assert not isinstance(plain, CostAware)
    assert isinstance(Budget(0.5), Covering)
    assert (budget.uses_active, getattr(plain, "uses_active", True)) == (False, True)
    for bounded in (budget, plain):
        for other in (copy.copy(bounded), copy.deepcopy(bounded), replace(bounded)):
            assert (type(other), other) == (type(bounded), bounded)
        assert pickle.loads(pickle.dumps(bounded)) == bounded
    assert repr(budget).startswith("Bounded(Budget(memory=0.5,")
    assert budget != Bounded(Budget(0.5), 4)


@pytest.mark.parametrize("bound", [0, -1, 2.0, True, None])
def test_a_bound_that_is_no_whole_number_is_refused(bound):
    with pytest.raises(ValueError, match=rf"max_idle_periods={bound} must be a whole number"):
        Bounded(Budget(0.5), bound)


def test_without_measured_costs_the_budget_says_where_they_come_from():
    with pytest.raises(ValueError, match=r"measured costs.*DynamicAllocationOptimizer"):
        Bounded(Budget(0.5), 3).select(context(None))


# Runs of real models


def waits(optimizer: Any, blocks: int) -> Iterator[int]:
    """For each selection of a run but the first, the longest that a block has waited since then."""
    idle = [0] * blocks
    for reallocation in [*optimizer.record][1:]:
        active = in_blocks(reallocation.chosen, optimizer)
        idle = [0 if block in active else n + 1 for block, n in enumerate(idle)]
        yield max(idle)


def of_blocks(blocks: int, seed: int = 0) -> TinyModel:
    return adapted("bert", sizes=replace(TINY, blocks=blocks), seed=seed)


def test_twenty_four_draws_leave_no_block_of_twelve_untouched():
    tiny = of_blocks(12)
    budget = Budget(0.40, 1.0)
    optimizer = on_budget(tiny, Bounded(budget, 6), period=1)
    tiny.loss()
    limit = budget.limit(costs_of(optimizer))
    seen = set()
    for _ in range(23):
        clear(tiny)
        if (active := frozenset(optimizer.active_groups)) in seen:
            tiny.loss().backward()
        else:
            peak, _ = measured(tiny.loss)
            assert peak <= limit
        seen.add(active)
        optimizer.step()
    assert len(optimizer.record) == 24
    assert max(waits(optimizer, 12)) <= 6
    assert set(optimizer.groups) == {g for r in optimizer.record for g in r.chosen}


def test_alone_such_a_budget_leaves_one_out():
    tiny = of_blocks(12)
    optimizer = on_budget(tiny, Budget(0.40, 1.0), period=1)
    run(tiny, optimizer, 23)
    assert max(waits(optimizer, 12)) > 6


@pytest.mark.parametrize("stop", [2, 5])
def test_a_run_goes_on_bit_for_bit_with_the_waits_it_had(stop):
    options = {"period": 2, "rule": torch.optim.AdamW}
    allocator = Bounded(Budget(0.5, 0.8), 3)
    whole = of_blocks(4)
    optimizer = on_budget(whole, allocator, **options)
    run(whole, optimizer, stop)
    states = saved_and_loaded(whole.model, optimizer)
    run(whole, optimizer, 20 - stop)

    fresh = of_blocks(4, seed=3)
    resumed = on_budget(fresh, allocator, **options)
    fresh.batch = whole.batch
    fresh.model.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    run(fresh, resumed, 20 - stop)
    assert same(weights(whole.model), weights(fresh.model))
    assert list(resumed.record) == list(optimizer.record)
    assert max(waits(optimizer, 4)) <= 3


def test_a_bound_that_cannot_be_kept_is_refused_before_the_first_step():
    tiny = of_blocks(4)
    optimizer = on_budget(tiny, Bounded(Budget(0.5, 0.45), 1), period=1)
    with pytest.raises(ValueError, match=r"max_idle_periods=1 cannot be kept.*pass at least"):
        tiny.loss()
    assert optimizer._allocation.costs is None
    assert len(optimizer.record) == 0
    optimizer.close()
    run(tiny, on_budget(tiny, Budget(0.5, 0.45)), 1)
