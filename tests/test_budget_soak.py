"""Random models in random loops on random budgets: no limit exceeded, no gradient changed."""

from __future__ import annotations

import random

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from soak_cases import Case, check

# Its numbers are drawn by Hypothesis, which can make them smaller.
cases = st.randoms(use_true_random=False).map(Case.drawn)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@given(case=cases)
def test_what_a_budget_promises_holds_in_every_loop(case):
    event(check(case))
