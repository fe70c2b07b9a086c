"""The search at its limits: 128 blocks that all differ, and the plans that it must leave out.

Its exactness where few partial plans remain is in `test_budget`. Here time is counted in partial
plans, which is the same number on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_budget import any_costs, context, ending_at, worths

from dynalora_optim import Budget
from dynalora_optim.allocation import _search
from dynalora_optim.allocation._costs import BlockCost, BlockUses, Costs, Plan, Use
from dynalora_optim.allocation._search import best_plan, cheapest_plan, least_peak

BLOCKS, TOKENS, WIDTH = 128, 2048, 768
HIDDEN = 4 * TOKENS * WIDTH  # bytes of one hidden state in float32
WORK = 2 * TOKENS * 12 * WIDTH**2  # FLOPs of a transformer block's forward
SEEDS, SHARES = range(3), (0.08, 0.15, 0.4)


def block_of(rank: int, *, whole: bool) -> BlockCost:
    """What a transformer block with LoRA of this rank costs, or one that trains as a whole."""
    adapter, low = 4 * TOKENS * rank * WIDTH // 64, 4 * TOKENS * rank * WIDTH
    kept, trained = 16 * HIDDEN, 16 * HIDDEN + adapter

    def uses(held: int, work: int, recomputed: int) -> BlockUses:
        full = Use(held + 3 * HIDDEN, held, held + 4 * HIDDEN, held + 3 * HIDDEN, work, HIDDEN)
        again = Use(
            held + 3 * HIDDEN,
            HIDDEN,
            held + 5 * HIDDEN,
            held + 4 * HIDDEN,
            work + recomputed,
            HIDDEN,
        )
        return BlockUses(full, again)

    return BlockCost(
        lowest=uses(trained - HIDDEN // 2, WORK * 3 // 4 + 2 * low, WORK + low),
        active=uses(trained, WORK + 2 * low, WORK + low),
        idle=uses(kept, WORK + low, WORK + low),
        below=4 * HIDDEN,
        gradients=4 * 12 * WIDTH**2 + rank if whole else 16 * rank * WIDTH,
    )


def differing(seed: int = 0, blocks: int = BLOCKS, *, whole: bool = False) -> Costs:
    """Costs of blocks with the ranks 1, 2, 3... in random order."""
    ranks = random.Random(seed).sample(range(1, blocks + 1), blocks)
    return Costs(
        blocks=tuple(block_of(rank, whole=whole) for rank in ranks),
        group_blocks=tuple(range(blocks)),
        pinned=frozenset(),
        head=Use(3 * HIDDEN, 2 * HIDDEN, 6 * HIDDEN, 6 * HIDDEN, WORK // 6),
        forward_base=2 * HIDDEN,
        backward_base=HIDDEN,
        entry=HIDDEN,
        head_gradients=4 * WIDTH**2,
        prefix=None,
        batch=TOKENS,
    )


def importances(seed: int, blocks: int = BLOCKS) -> list[float]:
    return [random.Random(seed + block).random() ** 2 for block in range(blocks)]


def value_of(plan: Plan, values: list[float]) -> float:
    return sum(values[block] for block in plan.active)


@pytest.fixture
def looked_at(monkeypatch) -> Iterator[list[int]]:
    """How many partial plans each block was tried on, of searches that nobody made before."""
    numbers: list[int] = []
    plain = _search.undominated

    def counted(partials, **options):
        numbers.append(len(partials))
        return plain(partials, **options)

    def forget() -> None:
        _search._best_plans.cache_clear()
        _search._least_peaks.cache_clear()

    forget()
    monkeypatch.setattr(_search, "undominated", counted)
    yield numbers
    forget()


@contextmanager
def keeping(most: int) -> Iterator[None]:
    """Search with so many partial plans kept of each block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_search, "_MOST", most)
        _search._best_plans.cache_clear()
        yield
    _search._best_plans.cache_clear()


@pytest.mark.parametrize(("seed", "share"), [*zip(SEEDS, SHARES, strict=True)])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("compute", [None, 0.6])
def test_the_worst_case_is_linear_in_the_blocks(looked_at, whole, share, seed, compute):
    """Two passes with one choice and two with all: block 0, and the lowest blocks above it."""
    costs = differing(seed, whole=whole)
    limit, values = int(share * costs.peak(costs.all_active)), importances(seed)
    flops = compute and compute * costs.flops(costs.all_active)
    for lowest in costs.lowest_blocks():
        plan = best_plan(costs, values, limit, lowest, flops)
        if plan:
            assert min(plan.active) == lowest
            assert costs.peak(plan) <= limit
            assert flops is None or costs.flops(plan) <= flops
    assert len(looked_at) <= 4 * BLOCKS
    assert max(looked_at) <= 4 * _search._MOST


def two_lists(seed: int, *, joined: bool) -> Costs:
    """The same blocks as two lists: towers that join, or an encoder and a decoder."""
    costs, half = differing(seed), BLOCKS // 2
    own = ((half, BLOCKS if joined else half),)
    return replace(costs, own=own, routes=(replace(costs, first=half),))


@pytest.mark.parametrize("joined", [False, True])
def test_several_lists_take_a_few_times_longer(looked_at, joined):
    """One search for each route, and in a tower that joins a second one, for where it ends."""
    costs = two_lists(0, joined=joined)
    limit, values = int(0.15 * costs.peak(costs.all_active)), importances(0)
    for lowest in costs.lowest_blocks():
        plan = best_plan(costs, values, limit, lowest)
        if plan:
            assert min(plan.active) == lowest
            assert costs.peak(plan) <= limit
    assert len(looked_at) <= 8 * BLOCKS
    assert max(looked_at) <= 4 * _search._MOST


@pytest.mark.parametrize("seed", SEEDS)
def test_given_blocks_and_the_least_peak_are_no_worse(looked_at, seed):
    costs = differing(seed)
    active = set(random.Random(seed).sample(range(BLOCKS), 40))
    limit = int(0.3 * costs.peak(costs.all_active))
    plan = cheapest_plan(costs, active, limit)
    assert plan.active == active
    assert costs.peak(plan) <= limit
    assert len(looked_at) <= BLOCKS
    assert max(looked_at) <= 4 * _search._MOST
    looked_at.clear()
    least = least_peak(costs, min(active), active)
    assert costs.peak(cheapest_plan(costs, active, least)) == least
    assert cheapest_plan(costs, active, least - 1) is None
    all_least = [least_peak(costs, lowest) for lowest in costs.lowest_blocks()]
    assert max(looked_at) <= 4 * _search._MOST
    for lowest in (0, 64):
        assert best_plan(costs, importances(seed), all_least[lowest], lowest)
        assert best_plan(costs, importances(seed), all_least[lowest] - 1, lowest) is None


@pytest.mark.parametrize("base", ["discounted", "topk"])
def test_a_budget_selects_among_many_different_blocks(looked_at, base):
    costs = differing()
    budget = Budget(0.4, 0.6, base=base)
    chosen = budget.select(context(costs, tuple(importances(0))))
    assert costs.peak(budget.plan(costs, chosen)) <= budget.limit(costs)
    assert max(looked_at) <= 4 * _search._MOST


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("whole", [False, True])
def test_narrower_boxes_would_gain_less_than_one_percent(whole, share):
    costs, values = differing(3, whole=whole), importances(3)
    limit = int(share * costs.peak(costs.all_active))
    found = [best_plan(costs, values, limit, lowest) for lowest in range(BLOCKS)]
    some = range(1, BLOCKS, 9)
    with keeping(4 * _search._MOST):
        narrower = {lowest: best_plan(costs, values, limit, lowest) for lowest in some}
    for lowest, finer in narrower.items():
        plan = found[lowest]
        assert value_of(plan, values) >= 0.99 * value_of(finer, values)
        if len(plan.active) < BLOCKS - lowest:  # what is recomputed is planned anew for the choice
            plan = cheapest_plan(costs, plan.active, limit)
        if plan.active == finer.active:
            assert costs.flops(plan) <= 1.01 * costs.flops(finer)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.45, 0.6, 0.8])
def test_few_different_blocks_are_within_one_percent_of_all_plans(whole, share):
    """The boxes are tried where every plan can still be looked at: with fewer of them."""
    costs, values = differing(4, blocks=6, whole=whole), importances(4, 6)
    limit = int(share * costs.peak(costs.all_active))
    for lowest in costs.lowest_blocks():
        fits = [plan for plan in ending_at(costs, lowest) if costs.peak(plan) <= limit]
        with keeping(64):
            found = best_plan(costs, values, limit, lowest)
        if not fits:
            assert found is None
            continue
        best = max(fits, key=lambda p: (value_of(p, values), -costs.flops(p)))
        assert value_of(found, values) >= 0.99 * value_of(best, values)
        if found.active == best.active:
            assert costs.flops(found) <= 1.01 * costs.flops(best)


@given(costs=any_costs(), values=worths, limit=st.integers(40, 400), data=st.data())
def test_no_plan_exceeds_the_limit_however_few_are_kept(costs, values, limit, data):
    lowest = data.draw(st.sampled_from(costs.lowest_blocks()))
    flops = data.draw(st.none() | st.integers(1, 60))
    with keeping(data.draw(st.integers(1, 3))):
        plan = best_plan(costs, values[: len(costs.blocks)], limit, lowest, flops)
    if plan:
        assert costs.route_of(plan)[1] == lowest
        assert costs.peak(plan) <= limit
        assert flops is None or costs.flops(plan) <= flops
