"""Hypothesis strategies for allocation problems: numbers only, as allocators see them."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st

from dynalora_optim import (
    AllocationContext,
    DiscountedStochastic,
    RoundRobin,
    Stochastic,
    Threshold,
    TopK,
    UniformRandom,
)

# Zeros, ties, and twelve orders of magnitude are where selections go wrong.
scores = st.one_of(
    st.just(0.0),
    st.integers(1, 5).map(float),
    st.floats(1e-6, 1e6),
    st.sampled_from([1e-300, 1e300]),
)

fixed_size = st.sampled_from(
    [TopK(), Stochastic(), DiscountedStochastic(), UniformRandom(), RoundRobin()]
)
any_allocator = st.one_of(
    fixed_size,
    st.just(Stochastic(sampling="bernoulli")),
    st.floats(0, 1).map(Threshold),
)


@st.composite
def contexts(draw: Any, max_modules: int = 12) -> AllocationContext:
    """Any allocation problem, its generator seeded."""
    modules = draw(st.integers(1, max_modules))
    return AllocationContext(
        scores=tuple(draw(st.lists(scores, min_size=modules, max_size=modules))),
        updates=tuple(draw(st.lists(st.integers(0, 50), min_size=modules, max_size=modules))),
        active=draw(st.integers(1, modules)),
        reallocation=draw(st.integers(0, 100)),
        generator=random.Random(draw(st.integers(0, 2**32))),
    )
