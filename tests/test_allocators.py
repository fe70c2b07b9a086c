"""Allocators: the properties that each must have, closed forms, and edge cases."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import any_allocator, contexts, fixed_size

from dynalora_optim import (
    AllocationContext,
    Allocator,
    DiscountedStochastic,
    RoundRobin,
    Stochastic,
    Threshold,
    TopK,
    UniformRandom,
)
from dynalora_optim.allocation._active import resolve_active
from dynalora_optim.allocation._allocators import SHORT_NAMES, as_allocator
from dynalora_optim.allocation._bounded import Bounded

DRAWS = 20_000


def problem(
    scores: list[float],
    active: int,
    updates: list[int] | None = None,
    reallocation: int = 0,
    seed: int = 0,
) -> AllocationContext:
    return AllocationContext(
        scores=tuple(scores),
        updates=tuple(updates or [0] * len(scores)),
        active=active,
        reallocation=reallocation,
        generator=random.Random(seed),
    )


def frequencies(allocator: Allocator, context: AllocationContext) -> dict[frozenset[int], float]:
    """How often each set came up in many draws from one generator."""
    drawn = Counter(frozenset(allocator.select(context)) for _ in range(DRAWS))
    return {chosen: count / DRAWS for chosen, count in drawn.items()}


def successive_draws(weights: list[float], active: int) -> dict[frozenset[int], float]:
    """The law of drawing one after the other without replacement, by enumerating every order."""
    law: Counter[frozenset[int]] = Counter()
    for order in itertools.permutations(range(len(weights)), active):
        probability, left = 1.0, sum(weights)
        for m in order:
            probability *= weights[m] / left
            left -= weights[m]
        law[frozenset(order)] += probability
    return dict(law)


def assert_law(found: dict[frozenset[int], float], expected: dict[frozenset[int], float]) -> None:
    """Every frequency within five standard errors of its probability."""
    assert set(found) <= {chosen for chosen, p in expected.items() if p > 0}
    for chosen, p in expected.items():
        error = math.sqrt(p * (1 - p) / DRAWS)
        assert found.get(chosen, 0.0) == pytest.approx(p, abs=5 * error + 1e-12), chosen


# Properties of every allocator


@given(any_allocator, contexts())
def test_selects_at_least_one_module_and_each_at_most_once(allocator, context):
    chosen = list(allocator.select(context))
    assert 1 <= len(chosen) == len(set(chosen))
    assert set(chosen) <= set(range(len(context.scores)))


@given(fixed_size, contexts())
def test_fixed_size_allocators_select_exactly_active_modules(allocator, context):
    assert len(allocator.select(context)) == context.active


@given(any_allocator, contexts(), st.integers(0, 2**32))
def test_selection_is_a_function_of_context_and_seed(allocator, context, seed):
    first, second = (
        allocator.select(replace(context, generator=random.Random(seed))) for _ in range(2)
    )
    assert list(first) == list(second)


@given(st.one_of(st.just(TopK()), st.floats(0, 1).map(Threshold)), contexts(), st.randoms())
def test_ranked_selection_is_permutation_equivariant(allocator, context, shuffler):
    # With ties the forward order decides, which a permutation changes: take distinct scores.
    distinct = tuple(float(2**m) for m in range(len(context.scores)))
    order = list(range(len(distinct)))
    shuffler.shuffle(order)
    straight = allocator.select(replace(context, scores=distinct))
    permuted = allocator.select(replace(context, scores=tuple(distinct[m] for m in order)))
    assert {order[m] for m in permuted} == set(straight)


@given(any_allocator, contexts(), st.sampled_from([2.0**-40, 2.0**-3, 2.0**5, 2.0**40]))
def test_selection_does_not_depend_on_the_scale_of_the_scores(allocator, context, factor):
    # Powers of two scale exactly, unless a score leaves the range of normal floats.
    scaled = tuple(score * factor for score in context.scores)
    if any(score and not 1e-290 < score < 1e290 for score in (*scaled, *context.scores)):
        return
    first, second = (
        allocator.select(replace(context, scores=scores, generator=random.Random(7)))
        for scores in (context.scores, scaled)
    )
    assert list(first) == list(second)


@given(contexts())
def test_importance_is_equation_2(context):
    importance = context.importance
    assert math.fsum(importance) == pytest.approx(1.0)
    assert all(y >= 0 for y in importance)
    total = sum(map(Fraction, context.scores))
    if total:
        expected = [float(Fraction(y) / total) for y in context.scores]
        assert importance == pytest.approx(expected, rel=1e-12)


# TopK and Threshold


@given(contexts())
def test_topk_leaves_no_module_out_that_beats_a_chosen_one(context):
    chosen = set(TopK().select(context))
    rest = set(range(len(context.scores))) - chosen
    if rest:
        assert min(context.scores[m] for m in chosen) >= max(context.scores[m] for m in rest)


def test_topk_breaks_ties_by_forward_order():
    assert TopK().select(problem([2, 3, 2, 3, 2], active=3)) == [1, 3, 0]


@given(contexts(), st.integers(0, 100).map(lambda percent: percent / 100))
def test_threshold_is_the_shortest_head_that_reaches_p(context, p):
    scores = [Fraction(score) for score in context.scores]
    if not any(scores):
        scores = [Fraction(1)] * len(scores)
    chosen = Threshold(p).select(context)
    needed = Fraction(str(p)) * sum(scores)
    assert sum(scores[m] for m in chosen) >= needed
    if len(chosen) > 1:
        assert sum(scores[m] for m in chosen[:-1]) < needed


def test_threshold_selects_one_module_where_the_published_code_selects_none():
    # Its rule keeps modules while the running sum stays below T: [10, 1, 1], T = 0.5 keeps none.
    assert Threshold(0.5).select(problem([10, 1, 1], active=3)) == [0]
    assert Threshold(0.0).select(problem([10, 1, 1], active=3)) == [0]


@pytest.mark.parametrize(
    ("p", "expected"), [(0.1, 1), (0.3, 3), (0.7, 7), (0.9, 9), (1.0, 10), (0.71, 8)]
)
def test_threshold_compares_exactly(p, expected):
    # In floats 0.1 * 3 > 0.3: a running float sum would select one module too few or too many.
    assert len(Threshold(p).select(problem([1.0] * 10, active=1))) == expected


def test_threshold_one_selects_all_modules_with_a_score_and_no_other():
    assert Threshold(1.0).select(problem([1, 0, 3, 0], active=1)) == [2, 0]


# Stochastic allocators against their laws


@pytest.mark.parametrize("active", [1, 2, 3])
def test_stochastic_has_the_law_of_successive_draws(active):
    scores = [1.0, 2.0, 3.0, 6.0]
    law = successive_draws(scores, active)
    assert sum(law.values()) == pytest.approx(1.0)
    assert_law(frequencies(Stochastic(), problem(scores, active)), law)


@pytest.mark.parametrize("active", [1, 2, 3])
def test_discounted_stochastic_has_the_law_of_equation_3(active):
    scores, updates = [4.0, 4.0, 1.0, 8.0], [0, 1, 2, 16]
    # C = 0 counts as 1: the first two modules weigh the same, neither a hundredfold.
    weights = [4.0, 4.0, 0.5, 0.5]
    found = frequencies(DiscountedStochastic(), problem(scores, active, updates))
    assert_law(found, successive_draws(weights, active))


def test_bernoulli_sampling_has_its_law():
    y = [0.1, 0.2, 0.7]
    law: Counter[frozenset[int]] = Counter()
    for outcome in itertools.product([False, True], repeat=3):
        probability = math.prod(y[m] if up else 1 - y[m] for m, up in enumerate(outcome))
        if any(outcome):
            law[frozenset(m for m, up in enumerate(outcome) if up)] += probability
        else:  # nothing came up: one module in proportion
            for m in range(3):
                law[frozenset([m])] += probability * y[m]
    assert sum(law.values()) == pytest.approx(1.0)
    assert_law(frequencies(Stochastic("bernoulli"), problem([1, 2, 7], 1)), dict(law))


def test_uniform_random_makes_every_set_equally_likely():
    sets = list(map(frozenset, itertools.combinations(range(5), 2)))
    found = frequencies(UniformRandom(), problem([9, 0, 1, 1, 1], 2))
    assert_law(found, dict.fromkeys(sets, 1 / len(sets)))


@pytest.mark.parametrize("allocator", [TopK(), Stochastic(), DiscountedStochastic()])
def test_before_any_score_every_set_is_equally_likely(allocator):
    sets = list(map(frozenset, itertools.combinations(range(4), 2)))
    found = frequencies(allocator, problem([0.0] * 4, 2))
    assert_law(found, dict.fromkeys(sets, 1 / len(sets)))


@pytest.mark.parametrize("allocator", [Stochastic(), DiscountedStochastic()])
def test_modules_without_a_score_are_drawn_last_and_uniformly(allocator):
    found = frequencies(allocator, problem([5.0, 0.0, 0.0, 0.0], 2))
    assert_law(found, {frozenset([0, m]): 1 / 3 for m in (1, 2, 3)})


@pytest.mark.parametrize("tiny", [5e-324, 1e-300])
def test_the_smallest_positive_weight_still_beats_zero(tiny):
    assert set(Stochastic().select(problem([0.0, tiny, 0.0, 1e300], 2))) <= {0, 1, 2, 3}
    chosen = frequencies(DiscountedStochastic(), problem([0.0, 1.0, 0.0, 1e-12], 2))
    assert chosen == {frozenset([1, 3]): 1.0}


# Round robin


def turns_of(active: list[int], modules: int) -> list[list[int]]:
    """The selections in a row, ``active`` modules in each."""
    idle, turns = [0] * modules, []
    for count in active:
        turns.append(
            sorted(RoundRobin().select(replace(problem([1.0] * modules, count), idle=tuple(idle))))
        )
        idle = [0 if m in turns[-1] else periods + 1 for m, periods in enumerate(idle)]
    return turns


@given(st.integers(1, 12), st.data())
def test_round_robin_visits_every_module_equally_often(modules, data):
    active = data.draw(st.integers(1, modules))
    visits = Counter(m for turn in turns_of([active] * modules, modules) for m in turn)
    assert visits == dict.fromkeys(range(modules), active)


def test_round_robin_goes_on_where_it_ended():
    assert turns_of([2, 2, 2, 2], modules=5) == [[0, 1], [2, 3], [0, 4], [1, 2]]
    assert turns_of([1, 3, 2], modules=6) == [[0], [1, 2, 3], [4, 5]], "also with another count"
    assert RoundRobin().select(problem([1.0] * 3, 2)) == [0, 1]


# The starvation bound


def idle_runs(allocator, modules: int, active: int, turns: int, draws: random.Random) -> list[int]:
    """The longest time, in selections, that each module is left out."""
    idle, longest = [0] * modules, [0] * modules
    for turn in range(turns):
        scores = [draws.choice([0.0, 1.0, 100.0, 1e6]) for _ in range(modules)]
        context = replace(problem(scores, active, reallocation=turn, seed=turn), idle=tuple(idle))
        chosen = allocator.select(context)
        assert len(set(chosen)) == len(chosen)
        idle = [0 if m in chosen else periods + 1 for m, periods in enumerate(idle)]
        longest = [max(pair) for pair in zip(longest, idle, strict=True)]
    return longest


@given(any_allocator, st.integers(1, 10), st.data())
def test_no_module_idles_longer_than_the_bound(allocator, modules, data):
    active = data.draw(st.integers(1, modules))
    tightest = max(1, math.ceil(modules / active) - 1)
    bound = data.draw(st.integers(tightest, tightest + 4))
    draws = random.Random(data.draw(st.integers(0, 1000)))
    longest = idle_runs(Bounded(allocator, bound), modules, active, 40, draws)
    assert max(longest) <= bound


@given(fixed_size, contexts(), st.integers(0, 2**32))
def test_the_bound_keeps_the_size_and_changes_nothing_while_it_is_far(allocator, context, seed):
    far = Bounded(allocator, 10_000)
    idle = tuple(m % 5 for m in range(len(context.scores)))
    with_idle = [replace(context, idle=idle, generator=random.Random(seed)) for _ in range(3)]
    free = allocator.select(with_idle[0])
    assert sorted(far.select(with_idle[1])) == sorted(free)
    tight = Bounded(allocator, 5).select(with_idle[2])
    assert len(tight) == len(free) or context.active * 6 < len(idle)


def test_an_urgent_module_takes_the_place_of_the_last_pick():
    context = replace(problem([9, 8, 7, 1], active=2), idle=(0, 0, 0, 3))
    assert sorted(Bounded(TopK(), 3).select(context)) == [0, 3]
    assert sorted(Bounded(TopK(), 4).select(context)) == [0, 1]


def test_deadlines_are_met_ahead_of_time_where_they_collide():
    # Three modules must be served within two selections of two: one of them goes now.
    context = replace(problem([9, 8, 3, 2, 1], active=2), idle=(0, 0, 2, 2, 2))
    assert sorted(Bounded(TopK(), 3).select(context)) == [0, 2]


def test_a_bound_that_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match=r"max_idle_periods=2 cannot be kept with 2 of 7.*least 3"):
        Bounded(TopK(), 2).check(2, 7)
    Bounded(TopK(), 3).check(2, 7)


# Options and their errors


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_short_names_stand_for_default_objects(name):
    assert as_allocator(name) == SHORT_NAMES[name]()


@pytest.mark.parametrize("allocator", ["top-k", "", "DISCOUNTED"])
def test_unknown_short_names_list_the_known_ones(allocator):
    with pytest.raises(ValueError, match=rf"allocator='{allocator}'.*'discounted'.*'topk'"):
        as_allocator(allocator)


@pytest.mark.parametrize("allocator", [3, None, TopK, object()])
def test_other_kinds_of_allocators_are_refused(allocator):
    with pytest.raises(TypeError, match="neither a short name nor an allocator"):
        as_allocator(allocator)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, math.inf])
def test_threshold_refuses_what_is_no_share(p):
    with pytest.raises(ValueError, match=r"Threshold\(p=.*\[0, 1\]"):
        Threshold(p)


def test_stochastic_refuses_unknown_sampling():
    with pytest.raises(ValueError, match="'fixed' or 'bernoulli'"):
        Stochastic("poisson")  # type: ignore[arg-type]


@given(st.integers(1, 600), st.floats(0, 1, exclude_min=True))
def test_a_share_resolves_to_the_nearest_count_of_at_least_one(modules, share):
    count = resolve_active(share, modules)
    assert 1 <= count <= modules
    assert abs(count - share * modules) <= 0.5 or count == 1


@pytest.mark.parametrize(
    ("share", "modules", "count"), [(2 / 3, 24, 16), (2 / 3, 12, 8), (1.0, 5, 5)]
)
def test_known_shares(share, modules, count):
    assert resolve_active(share, modules) == count


@pytest.mark.parametrize("active", [0, -1, 25, 0.0, -0.5, 1.5, math.nan, math.inf, -math.inf])
def test_active_out_of_range_names_value_and_range(active):
    with pytest.raises(ValueError, match=rf"active={active}.*24"):
        resolve_active(active, 24)


@pytest.mark.parametrize("active", [True, "16", None])
def test_active_of_another_kind_is_refused(active):
    with pytest.raises(TypeError, match="active="):
        resolve_active(active, 24)
