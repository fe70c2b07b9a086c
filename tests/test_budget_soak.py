"""Random models in random loops on random budgets: no limit exceeded, no gradient changed."""

from __future__ import annotations

import json

import pytest
import soak
from hypothesis import event, given
from hypothesis import strategies as st
from soak_cases import Case, Outcome, check

# Its numbers are drawn by Hypothesis, which can make them smaller.
cases = st.randoms(use_true_random=False).map(Case.drawn)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@given(case=cases)
def test_what_a_budget_promises_holds_in_every_loop(case):
    event(check(case).kind)


@pytest.mark.parametrize("number", [4416, 5910, 7557, 9313])
def test_what_the_soak_has_found_stays_mended(number):
    assert check(soak.case_of(0, number)).kind in ("held", "refused")


@pytest.mark.parametrize("number", [65, 435, 855, 3195])
def test_a_growing_forward_is_not_refused(number):
    """Earlier forwards of the step held the memory, and the step was refused once."""
    case = soak.case_of(0, number)
    assert case.grows
    outcome = check(case)
    assert outcome.kind == "held"
    assert not outcome.again


@pytest.mark.parametrize("number", [95, 210, 327, 344])
def test_what_the_soak_of_whole_blocks_has_found_stays_mended(number):
    """A copy of the model was measured in which frozen parts trained."""
    assert check(soak.case_of(7, number, blocks=True)).kind in ("held", "refused")


def test_a_whole_block_that_a_growing_forward_makes_inactive_is_recomputed_as_it_ran():
    assert check(soak.case_of(0, 537, blocks=True)).kind == "held"


def test_the_soak_goes_on_where_it_ended_and_repeats_what_failed(tmp_path, monkeypatch):
    path, tried, broken = tmp_path / "soak.jsonl", [], {2, 51}

    def tried_case(case: Case) -> Outcome:
        number = next(n for n in range(60) if soak.case_of(3, n) == case)
        tried.append(number)
        assert number not in broken, "exceeded"
        return Outcome("held", number / 50)

    monkeypatch.setattr(soak, "check", tried_case)
    arguments = ["--seed", "3", "--output", str(path), "--cases"]
    assert soak.main([*arguments, "52"]) == 1
    (row,) = map(json.loads, path.read_text().splitlines())
    assert (row["cases"], row["held"], row["refused"]) == (52, 50, 0)
    assert [failed["number"] for failed in row["failed"]] == [2, 51]
    assert repr(soak.case_of(3, 51)) == row["failed"][1]["case"]
    tried.clear()
    broken.clear()
    assert soak.main([*arguments, "55"]) == 0
    assert tried == [2, 51, 52, 53, 54]
    (row,) = map(json.loads, path.read_text().splitlines())
    assert (row["cases"], row["held"], row["failed"]) == (55, 55, [])
    assert (row["measured_beyond"], row["measured_most"]) == (4, 1.08)
    assert soak.main([*arguments, "60", "--growing"]) == 0
    whole, growing = map(json.loads, path.read_text().splitlines())
    assert whole == row
    grow = sum(soak.case_of(3, number).grows for number in range(60))
    assert (growing["row"], growing["cases"]) == ("seed 3, growing", grow)


def test_a_case_is_made_from_the_seed_and_its_number_alone():
    assert soak.case_of(1, 5) == soak.case_of(1, 5)
    assert len({soak.case_of(1, number) for number in range(50)}) == 50
    assert check(soak.case_of(0, 0)).kind in ("held", "refused")
