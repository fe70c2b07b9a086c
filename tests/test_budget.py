"""`Budget`: the exact choice against brute force, its probabilities, its bounds, its messages.

Numbers only: no model is built here.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dynalora_optim import AllocationContext, Budget
from dynalora_optim.allocation._costs import BlockCost, BlockUses, Costs, Plan, Use
from dynalora_optim.allocation._loop import Loop
from dynalora_optim.allocation._resident import NOTHING, UNIT, Resident
from dynalora_optim.allocation._saved_costs import restored_costs, saved_costs
from dynalora_optim.allocation._search import best_plan, cheapest_plan, least_peak
from dynalora_optim.allocation._tilt import tilt

DRAWS, SELECTIONS = 2_000, 150
STOCHASTIC = ("discounted", "stochastic", "random")
sizes = st.integers(0, 40)


@st.composite
def uses(draw: Any, held: Any = sizes) -> Use:
    numbers = draw(sizes), draw(held), draw(sizes), draw(sizes)
    return Use(*numbers, draw(st.integers(1, 9)), draw(sizes))


@st.composite
def block_costs(draw: Any) -> BlockCost:
    role = st.builds(BlockUses, uses(), uses())
    return BlockCost(draw(role), draw(role), draw(role), draw(sizes), draw(st.integers(0, 9)))


@st.composite
def any_costs(draw: Any) -> Costs:
    """Costs of up to four blocks without rhyme or reason: the search must not rely on any."""
    count = draw(st.integers(1, 4))
    places = draw(st.sets(st.integers(0, count - 1), min_size=1))
    second = draw(st.integers(0, count - 1))  # the first block of a second list; 0: there is none
    layout = {
        "group_blocks": (*sorted(places), None),
        "pinned": frozenset(draw(st.sets(st.integers(0, count - 1), max_size=1))),
    }
    shared = {**layout, "loop": draw(st.just(Loop()) | loops(count, layout))}
    prefix = draw(st.none() | uses())
    if not second:
        return draw(a_route(count, prefix=prefix, **shared))
    reached = draw(st.integers(second, count))
    later = draw(a_route(count, prefix=prefix, first=second, group_blocks=(), pinned=frozenset()))
    own = ((second, reached),)
    return draw(a_route(count, prefix=None, own=own, routes=(later,), **shared))


@st.composite
def a_route(draw: Any, count: int, **given: Any) -> Costs:
    return Costs(
        blocks=tuple(draw(st.lists(block_costs(), min_size=count, max_size=count))),
        head=draw(uses()),
        forward_base=draw(st.integers(40, 60)),
        backward_base=draw(sizes),
        entry=draw(sizes),
        head_gradients=draw(sizes),
        batch=1,
        before=draw(sizes),
        prefix_gradients=draw(sizes),
        output=draw(sizes),
        output_alone=draw(sizes),
        **given,
    )


# State that exists only while its block trains: whole bytes per byte of gradients are exact.
residents = st.builds(
    Resident,
    active=st.integers(0, 3).map(lambda bytes_: bytes_ * UNIT),
    update=st.integers(0, 3).map(lambda bytes_: bytes_ * UNIT),
    outer_update=sizes,
    most_update=st.integers(0, 100),
)


@st.composite
def loops(draw: Any, blocks: int, layout: dict[str, Any]) -> Loop:
    standing = draw(st.integers(0, 1))
    gradients = {"standing": standing, "waiting": standing + draw(st.integers(0, 1))}
    follower = a_route(blocks, prefix=None, loop=Loop(**gradients), **layout)
    follower |= follower.map(as_constant)
    return Loop(
        carried=draw(sizes),
        **gradients,
        grows=draw(st.booleans()),
        keeps_output=draw(st.booleans()),
        update=draw(st.integers(0, 100)),
        followers=tuple(draw(st.lists(follower, max_size=1))),
        resident=draw(st.just(NOTHING) | residents),
    )


def as_constant(costs: Costs) -> Costs:
    """Costs of a forward that takes the same, whichever blocks train."""
    idle = costs.blocks[0].idle
    role = BlockUses(*(replace(use, spent=use.backward) for use in (idle.full, idle.checkpointed)))
    blocks = (BlockCost(role, role, role, below=0, gradients=0),) * len(costs.blocks)
    head = replace(costs.head, spent=costs.head.backward)
    none = {"entry": 0, "head_gradients": 0, "prefix_gradients": 0, "loop": Loop()}
    return replace(costs, blocks=blocks, head=head, **none)


def is_exact(costs: Costs) -> bool:
    """Whether the search knows what further forwards need before it knows which blocks train."""
    loop = costs.loop
    if not loop.followers:
        return loop.is_even
    # Those that are drawn as constant have no gradients, and end where a block trains.
    constant = all(as_constant(follower) == follower for follower in loop.followers)
    return constant and not (loop.standing or loop.waiting or costs.prefix)


def layered(blocks: int = 5, groups: int = 1, *, pinned: tuple[int, ...] = ()) -> Costs:
    """Costs of alike blocks such as a transformer has, ``groups`` allocated modules in each."""
    full, kept = Use(50, 40, 60, 60, 20, 4), Use(50, 4, 100, 100, 30, 4)
    idle = BlockUses(Use(48, 38, 58, 58, 18, 4), Use(48, 4, 96, 96, 28, 4))
    cost = BlockCost(BlockUses(full, kept), BlockUses(full, kept), idle, below=30, gradients=2)
    return Costs(
        blocks=(cost,) * blocks,
        group_blocks=tuple(b for b in range(blocks) for _ in range(groups)),
        pinned=frozenset(pinned),
        head=Use(10, 5, 15, 15, 3),
        forward_base=8,
        backward_base=6,
        entry=4,
        head_gradients=3,
        prefix=None,
        batch=1,
    )


def context(
    costs: Costs | None,
    scores: tuple[float, ...] = (),
    updates: tuple[int, ...] = (),
    seed: int = 0,
    **options: Any,
) -> AllocationContext:
    groups = len(costs.group_blocks) if costs else 3
    return AllocationContext(
        scores=scores or (1.0,) * groups,
        updates=updates or (0,) * groups,
        active=1,
        reallocation=options.pop("reallocation", 0),
        generator=random.Random(seed),
        costs=costs,
        **options,
    )


def every_plan(costs: Costs, active: frozenset[int] | None = None) -> Iterator[Plan]:
    """All plans that there are, or those in which just ``active`` trains."""
    blocks = range(len(costs.blocks))
    sets = [active] if active is not None else subsets(blocks)
    for trains in sets:
        if trains and trains >= costs.pinned and trains <= costs.all_active.active:
            reached = [block for block, _ in costs.roles(Plan(trains))]
            for checkpointed in subsets(reached):
                yield Plan(trains, checkpointed)


def subsets(items: Any) -> Iterator[frozenset[int]]:
    items = list(items)
    for size in range(len(items) + 1):
        yield from map(frozenset, itertools.combinations(items, size))


def ending_at(costs: Costs, lowest: int) -> list[Plan]:
    return [plan for plan in every_plan(costs) if costs.route_of(plan)[1] == lowest]


def outcome(costs: Costs, values: list[float], plan: Plan | None) -> tuple[float, int] | None:
    """What a plan is worth, and its work: equally good plans are told apart by no one."""
    if plan is None:
        return None
    return sum(values[block] for block in plan.active), -costs.flops(plan)


worths = st.lists(st.integers(1, 9).map(float), min_size=4, max_size=4)


@given(costs=any_costs(), values=worths, limit=st.integers(40, 400), data=st.data())
def test_the_best_plan_is_that_of_brute_force(costs, values, limit, data):
    lowest = data.draw(st.sampled_from(costs.lowest_blocks()))
    fits = [plan for plan in ending_at(costs, lowest) if costs.peak(plan) <= limit]
    flops = data.draw(st.none() | st.integers(1, 60))
    if flops is not None:
        fits = [plan for plan in fits if costs.flops(plan) <= flops]
    best = max((outcome(costs, values, plan) for plan in fits), default=None)
    found = best_plan(costs, values[: len(costs.blocks)], limit, lowest, flops)
    assert found is None or found in fits
    if is_exact(costs):
        assert outcome(costs, values, found) == best
    elif not found:  # then the lowest block alone does not fit
        assert costs.pinned | {lowest} not in {plan.active for plan in fits if flops is None}


@given(costs=any_costs(), limit=st.integers(40, 400), data=st.data())
def test_the_cheapest_plan_is_that_of_brute_force(costs, limit, data):
    lowest = data.draw(st.sampled_from(costs.lowest_blocks()))
    active = data.draw(st.sampled_from([p.active for p in ending_at(costs, lowest)]))
    fits = [p for p in every_plan(costs, active) if costs.peak(p) <= limit]
    found = cheapest_plan(costs, active, limit)
    assert (found and costs.flops(found)) == min(map(costs.flops, fits), default=None)
    assert found is None or found in fits


@given(costs=any_costs(), data=st.data())
def test_the_least_peak_is_that_of_brute_force(costs, data):
    lowest = data.draw(st.sampled_from(costs.lowest_blocks()))
    assume(is_exact(costs))
    assert least_peak(costs, lowest) == min(map(costs.peak, ending_at(costs, lowest)))


@given(costs=any_costs(), data=st.data())
def test_the_least_peak_of_given_blocks_is_that_of_brute_force(costs, data):
    plan = data.draw(st.sampled_from(list(every_plan(costs))))
    assume(costs.route_of(plan)[1] in costs.lowest_blocks())
    least = min(map(costs.peak, every_plan(costs, plan.active)))
    assert least_peak(costs, min(plan.active), plan.active) == least


def test_in_a_loop_of_several_forwards_the_plan_of_one_block_trains_what_can_train():
    """If what comes before the blocks trains, the first one stands for the route in any case."""
    costs = replace(layered(3), group_blocks=(1, 2), prefix=Use(50, 40, 60, 60, 20))
    costs = costs.in_loop(standing=1, waiting=2, followers=(costs,))
    least = min(costs.peak(plan) for plan in ending_at(costs, 0))
    for limit in (least, 10 * least):
        plan = best_plan(costs, [0.0, 1.0, 2.0], limit, 0)
        assert plan in [plan for plan in ending_at(costs, 0) if costs.peak(plan) <= limit]


def test_a_later_list_in_which_nothing_can_train_runs_without_a_graph():
    """What its blocks take then counts, although they would take less with a graph."""
    costs = layered(4)
    large = tuple(replace(block, below=1000) for block in costs.blocks)
    later = replace(costs, blocks=large, first=2, group_blocks=())
    costs = replace(costs, blocks=large, group_blocks=(0, 1), own=((2, 4),), routes=(later,))
    active = frozenset({0})
    least = min(map(costs.peak, every_plan(costs, active)))
    assert least_peak(costs, 0, active) == least > 1000
    assert cheapest_plan(costs, active, least - 1) is None
    assert best_plan(costs, [1.0] * 4, least - 1, 0) is None
    plan = best_plan(costs, [1.0] * 4, 2 * least, 0)
    assert plan
    assert plan.active <= costs.trainable


@given(costs=any_costs(), scores=worths, memory=st.integers(40, 400))
def test_topk_takes_the_most_important_modules_that_fit(costs, scores, memory):
    blocks = [block for block in costs.group_blocks if block is not None]
    worth = dict(zip(blocks, scores, strict=False))
    budget = Budget(memory=memory, base="topk")
    reachable = [p for p in every_plan(costs) if costs.route_of(p)[1] in costs.lowest_blocks()]
    fits = [plan for plan in reachable if costs.peak(plan) <= memory]
    assume(is_exact(costs))
    problem = context(costs, (*scores[: len(blocks)], 1.0))
    if not fits:
        with pytest.raises(ValueError, match=r"pass at least memory="):
            budget.select(problem)
        return
    chosen = budget.select(problem)
    assert chosen[-1] == len(blocks)  # the module after the blocks costs nothing
    best = max(sum(worth.get(b, 0) for b in plan.active) for plan in fits)
    assert sum(scores[group] for group in chosen[:-1]) == best
    assert budget.plan(costs, chosen) in fits
    assert budget.select(problem) == chosen


@pytest.mark.parametrize("base", STOCHASTIC)
@pytest.mark.parametrize("compute", [None, 0.9, 0.6])
@given(scores=st.lists(st.sampled_from([0.0, 1.0, 1e6]), min_size=10, max_size=10), data=st.data())
def test_every_module_keeps_its_floor(base, compute, scores, data):
    costs = layered(groups=2, pinned=data.draw(st.sampled_from([(), (3,)])))
    updates = tuple(data.draw(st.lists(st.integers(0, 99), min_size=10, max_size=10)))
    budget = Budget(memory=0.8, compute=compute, base=base, floor=0.2)
    found = budget.probabilities(context(costs, tuple(scores), updates))
    least = 0.2 / len(costs.lowest_blocks()) / (10 if compute else 1)
    assert all(least <= p * (1 + 1e-9) and p <= 1 for p in found)
    assert found[0::2] == found[1::2]  # the modules of one block are active together
    assert found[-1] == pytest.approx(1.0) or compute or not costs.pinned


def test_the_lowest_block_is_drawn_by_importance_per_unit_of_cost():
    costs = layered(blocks=3)
    roomy = Budget(memory=1.0, base="stochastic", floor=1e-9)
    low, middle, high = roomy.probabilities(context(costs, (6.0, 2.0, 1.0)))
    weights = [6.0 / 63, 2.0 / 43, 1.0 / 23]  # FLOPs: 20 a block and 3 of the head
    assert low == pytest.approx(weights[0] / sum(weights), abs=1e-6)
    assert middle - low == pytest.approx(weights[1] / sum(weights), abs=1e-6)
    assert high == pytest.approx(1.0)


def test_the_bases_differ_in_what_they_make_of_importance():
    costs = layered(blocks=3)

    def lowest(base: str, **numbers: tuple[float, ...]) -> float:
        return Budget(memory=1.0, base=base).probabilities(context(costs, **numbers))[0]

    scored = {"scores": (9.0, 1.0, 1.0)}
    served = {**scored, "updates": (50, 1, 1)}
    assert lowest("random", **served) == pytest.approx(lowest("random"))
    assert lowest("random") == pytest.approx(lowest("stochastic"))
    assert lowest("stochastic", **served) == lowest("stochastic", **scored) > lowest("random")
    assert lowest("discounted", **served) < lowest("discounted", **scored)


@pytest.mark.parametrize("base", STOCHASTIC)
def test_modules_are_chosen_as_often_as_their_probability_says(base):
    costs = layered(groups=2, pinned=(4,))
    budget = Budget(memory=0.7, compute=0.7, base=base)
    problem = context(costs, tuple(map(float, range(1, 11))), tuple(range(10)))
    drawn = Counter(m for _ in range(DRAWS) for m in budget.select(problem))
    for module, p in enumerate(budget.probabilities(problem)):
        deviation = math.sqrt(max(p * (1 - p), 1e-12) / DRAWS)
        assert drawn[module] / DRAWS == pytest.approx(p, abs=4 * deviation + 1e-9)


@pytest.mark.parametrize("base", [*STOCHASTIC, "topk"])
@pytest.mark.parametrize("compute", [0.45, 0.5, 0.8])
@pytest.mark.parametrize(
    "scores", [(1.0,) * 6, (9.0, 1.0, 1.0, 1.0, 1.0, 0.0), (0, 0, 0, 1.0, 0, 0)]
)
def test_the_mean_step_stays_within_compute(base, compute, scores):
    """What a run may exceed the bound by is what the last selections can: a pass or two."""
    costs = layered(blocks=6)
    budget = Budget(memory=0.8, compute=compute, base=base)
    whole, spent, updates = costs.flops(costs.all_active), 0.0, [0] * 6
    for step in range(SELECTIONS):
        problem = context(
            costs,
            scores,
            tuple(updates),
            seed=step,
            reallocation=step,
            mean_compute=spent / max(step, 1),
        )
        chosen = budget.select(problem)
        plan = budget.plan(costs, chosen)
        assert costs.peak(plan) <= budget.limit(costs)
        spent += costs.flops(plan) / whole
        for module in chosen:
            updates[module] += 1
    assert spent <= SELECTIONS * compute + 2


@given(
    weights=st.lists(st.floats(1e-6, 1), min_size=2, max_size=6),
    costs=st.lists(st.floats(0.01, 2), min_size=6, max_size=6),
    target=st.floats(0.01, 2),
)
def test_the_tilt_meets_its_target_and_is_none_where_none_is_needed(weights, costs, target):
    costs = costs[: len(weights)]
    found = tilt(weights, costs, target)
    mean = sum(p * c for p, c in zip(found, costs, strict=True))
    plain = [w / sum(weights) for w in weights]
    assert sum(found) == pytest.approx(1.0)
    assert mean <= max(target, min(costs)) + 1e-3
    if sum(p * c for p, c in zip(plain, costs, strict=True)) <= target - 1e-9:
        assert found == pytest.approx(plain)
    else:  # no more than is needed
        assert mean >= min(target, max(costs)) - 1e-3 or mean <= min(costs) + 1e-3


def smallest(message: str) -> tuple[float, int]:
    share, size = re.search(r"memory=(\S+) or (\d+) bytes", message).groups()
    return float(share), int(size)


@pytest.mark.parametrize("base", ["discounted", "topk"])
@pytest.mark.parametrize("memory", [0.01, 20])
@given(blocks=st.integers(1, 6), pinned=st.sets(st.integers(0, 5), max_size=1))
def test_a_budget_that_is_too_small_is_told_the_smallest_that_is_not(base, memory, blocks, pinned):
    costs = layered(blocks, pinned=tuple(pinned & set(range(blocks))))
    with pytest.raises(ValueError, match=r"cannot hold a step") as refused:
        Budget(memory=memory, base=base).select(context(costs))
    share, size = smallest(str(refused.value))
    for enough in (share, size):
        chosen = Budget(memory=enough, base=base).select(context(costs))
        assert costs.peak(Budget(memory=enough, base=base).plan(costs, chosen)) <= max(
            size, math.floor(share * costs.peak(costs.all_active))
        )
    with pytest.raises(ValueError, match=r"cannot hold a step"):
        Budget(memory=size - 1, base=base).select(context(costs))


def test_a_refusal_names_what_takes_the_memory_beside_the_blocks():
    costs = layered()
    heavy = replace(costs, head=Use(500, 5, 600, 600, 3))
    loops = costs.in_loop(standing=1, waiting=2, followers=(costs,))
    for measured, word in ((heavy, "a loss in chunks"), (loops, "Several forward passes")):
        with pytest.raises(ValueError, match=f"pass at least memory=.*{word}"):
            Budget(memory=20).plan(measured, [0])
    with pytest.raises(ValueError, match="Gradients are alive in the forward pass"):
        Budget(memory=20).plan(loops, [0])
    with pytest.raises(ValueError, match=r"GiB\.$"):
        Budget(memory=20).plan(costs, [0])


def test_a_share_means_what_its_digits_say():
    """0.29 * 100 is 28.999999999999996: a float would lose the last byte."""
    costs = layered(blocks=1)
    whole = costs.peak(costs.all_active)
    for hundredth in range(1, 101):
        limit = Budget(memory=hundredth / 100).limit(costs)
        assert limit == hundredth * whole // 100


@pytest.mark.parametrize("base", ["random", "topk"])
def test_compute_that_no_choice_meets_is_told_the_least_that_one_does(base):
    costs = layered()
    with pytest.raises(ValueError, match=r"Budget\(compute=0.1\).*pass at least") as refused:
        Budget(memory=1.0, compute=0.1, base=base).select(context(costs))
    (least,) = re.findall(r"at least (\S+)\.$", str(refused.value))
    Budget(memory=1.0, compute=float(least), base=base).select(context(costs))
    with pytest.raises(ValueError, match=r"pass at least"):
        Budget(memory=1.0, compute=float(least) - 0.001, base=base).select(context(costs))


def test_modules_that_do_not_fit_are_told_what_they_need():
    """As after a resume with a smaller budget, or in a warm-up in which all are active."""
    costs = layered()
    least = least_peak(costs, 0, range(5))
    with pytest.raises(ValueError, match=rf"blocks \[0, 1, 2, 3, 4\].* {least} bytes"):
        Budget(memory=least - 1).plan(costs, range(5))
    assert costs.peak(Budget(memory=least).plan(costs, range(5))) == least


@given(memory=st.integers(100, 300), chosen=st.sets(st.integers(0, 4), min_size=1))
def test_a_choice_that_has_become_too_large_loses_its_lowest_blocks(memory, chosen):
    costs = layered()
    budget = Budget(memory=memory, base="topk")
    if memory < least_peak(costs, max(chosen), {max(chosen)}):
        with pytest.raises(ValueError, match=r"cannot hold"):
            budget.fitting(costs, sorted(chosen))
        return
    kept = budget.fitting(costs, sorted(chosen))
    assert kept == sorted(chosen)[-len(kept) :]
    assert costs.peak(budget.plan(costs, kept)) <= memory
    if len(kept) < len(chosen):
        with pytest.raises(ValueError, match=r"cannot hold"):
            budget.plan(costs, sorted(chosen)[-len(kept) - 1 :])


def test_a_batch_for_which_some_block_could_never_train_is_refused():
    """Not only when that block is drawn, in the middle of a run."""
    costs = layered()
    enough = least_peak(costs, 4)
    assert enough < least_peak(costs, 0)
    with pytest.raises(ValueError, match=r"cannot hold a step"):
        Budget(memory=enough).fitting(costs, [4])


BAD = {
    "no bytes": ({"memory": 0}, r"memory=0\) is not positive; pass a number of bytes"),
    "negative bytes": ({"memory": -5}, r"memory=-5\) is not positive"),
    "share above one": ({"memory": 1.5}, r"memory=1.5\) is not a share in \(0, 1\]; pass one, or"),
    "negative share": ({"memory": -0.5}, r"memory=-0.5\) is not a share"),
    "nan": ({"memory": math.nan}, r"memory=nan\) is not a share"),
    "inf": ({"memory": math.inf}, r"memory=inf\) is not a share"),
    "bool": ({"memory": True}, r"memory=True\) is not a number of bytes; pass a share"),
    "compute zero": ({"compute": 0}, r"compute=0\) is not a positive share.*pass one such as 0.6"),
    "compute nan": ({"compute": math.nan}, r"compute=nan\) is not a positive share"),
    "compute inf": ({"compute": math.inf}, r"compute=inf\) is not a positive share"),
    "compute bool": ({"compute": True}, r"compute=True\) is not a number"),
    "compute text": ({"compute": "0.5"}, r"compute='0.5'\) is not a number"),
    "base": ({"base": "best"}, r"base='best' is not a known.*\['discounted', 'random', 'stoch"),
    "no floor": ({"floor": 0.0}, r"floor=0.0\).*pass a share in \(0, 1\]"),
    "floor above one": ({"floor": 1.5}, r"floor=1.5\).*pass a share in \(0, 1\]"),
    "floor nan": ({"floor": math.nan}, r"floor=nan\)"),
    "floor text": ({"floor": "some"}, r"floor='some'\) is not a number"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_a_bad_argument_is_named_with_its_remedy(options, message):
    with pytest.raises((TypeError, ValueError), match=message) as refused:
        Budget(**{"memory": 0.5, **options})
    assert isinstance(refused.value, TypeError) == ("not a number" in message)


def test_a_budget_without_measured_costs_says_where_they_come_from():
    with pytest.raises(ValueError, match=r"measured costs.*DynamicAllocationOptimizer"):
        Budget(memory=0.5).select(context(None))


@given(costs=any_costs())
def test_costs_survive_a_state_dict(costs):
    modules = len(costs.group_blocks)
    assert restored_costs(saved_costs(costs), modules=modules) == costs
    with pytest.raises(ValueError, match="costs of other modules"):
        restored_costs(saved_costs(costs), modules=modules + 1)
