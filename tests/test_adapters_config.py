"""LoRAConfig: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynalora_adapters import LoRAConfig

GOOD = {"rank": 8, "alpha": 16, "targets": ["query"]}


@given(rank=st.integers(1, 4096), alpha=st.floats(1e-3, 1e4))
def test_scaling_is_alpha_over_rank_or_over_its_root(rank: int, alpha: float) -> None:
    plain = LoRAConfig(rank=rank, alpha=alpha, targets=["q"])
    rooted = dataclasses.replace(plain, rslora=True)
    assert plain.scaling * rank == pytest.approx(alpha)
    assert rooted.scaling**2 * rank == pytest.approx(alpha**2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": -3}, ValueError, "rank must be at least 1, got -3"),
        ({"rank": True}, TypeError, "rank must be an int, got True"),
        ({"rank": 8.0}, TypeError, "rank must be an int, got 8.0"),
        ({"rank": "8"}, TypeError, "rank must be an int"),
        ({"alpha": 0}, ValueError, "alpha must be positive and finite, got 0"),
        ({"alpha": -1.0}, ValueError, "alpha must be positive"),
        ({"alpha": math.nan}, ValueError, "alpha must be positive and finite, got nan"),
        ({"alpha": math.inf}, ValueError, "alpha must be positive and finite, got inf"),
        ({"alpha": 10**400}, ValueError, "alpha must be positive and finite"),
        ({"alpha": "16"}, TypeError, "alpha must be a number, got '16'"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout must lie in"),
        ({"dropout": math.nan}, ValueError, "dropout must lie in"),
        ({"dropout": None}, TypeError, "dropout must be a number, got None"),
        ({"targets": []}, ValueError, r"targets must name at least one module, got \(\)"),
        ({"targets": ""}, ValueError, "targets must name at least one module"),
        ({"targets": None}, TypeError, "targets must be a list of module names or a string"),
        ({"targets": [1]}, TypeError, "targets must hold non-empty strings, got 1"),
        ({"targets": [""]}, TypeError, "targets must hold non-empty strings"),
        ({"targets": "(query"}, ValueError, "targets holds .* not a regular expression"),
        ({"exclude": "*"}, ValueError, "exclude holds .* not a regular expression"),
        ({"exclude": 3}, TypeError, "exclude must be a list"),
        ({"trainable": [None]}, TypeError, "trainable must hold non-empty strings"),
        ({"bias": "lora_only"}, ValueError, r"bias must be one of .*adapted.*, got 'lora_only'"),
        ({"rslora": 1}, TypeError, "rslora must be a bool, got 1"),
        ({"rank_pattern": ["q"]}, TypeError, "rank_pattern must be a dict"),
        ({"rank_pattern": {"(": 4}}, ValueError, "rank_pattern holds"),
        ({"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\] must be at least 1"),
        ({"rank_pattern": {1: 4}}, TypeError, "rank_pattern must have strings as keys, got 1"),
        ({"alpha_pattern": {"q": -1}}, ValueError, r"alpha_pattern\['q'\] must be positive"),
    ],
)
def test_a_bad_option_is_named_with_its_value(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LoRAConfig(**{**GOOD, **options})


@given(st.recursive(st.none() | st.floats() | st.integers() | st.text(), st.lists))
def test_any_value_of_any_option_is_accepted_or_refused_with_a_typed_error(value: object) -> None:
    for field in dataclasses.fields(LoRAConfig):
        with contextlib.suppress(TypeError, ValueError):
            LoRAConfig(**{**GOOD, field.name: value})


def test_lists_are_frozen_so_that_the_configuration_is_a_value() -> None:
    targets = ["query", "value"]
    config = LoRAConfig(rank=4, alpha=8, targets=targets, trainable="head")
    targets.append("key")
    assert config.targets == ("query", "value")
    assert config.trainable == ("head",)
    assert config == LoRAConfig(rank=4, alpha=8, targets=("query", "value"), trainable=["head"])
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 2  # type: ignore[misc]


def test_sets_are_sorted_so_that_runs_are_repeatable() -> None:
    assert LoRAConfig(rank=4, alpha=8, targets={"b", "a", "c"}).targets == ("a", "b", "c")


def test_patterns_match_the_end_of_a_name_and_the_first_key_wins() -> None:
    config = LoRAConfig(
        rank=8,
        alpha=16,
        targets=["q"],
        rank_pattern={r"1\.q": 2, "q": 4},
        alpha_pattern={"model.0.q": 1},
    )
    assert config.layer_options("model.1.q") == {"rank": 2, "alpha": 16, "scaling": 8.0}
    assert config.layer_options("model.0.q") == {"rank": 4, "alpha": 1, "scaling": 0.25}
    assert config.layer_options("model.0.eq") == {"rank": 8, "alpha": 16, "scaling": 2.0}


def test_the_remedy_for_a_bad_pattern_is_in_the_message() -> None:
    with pytest.raises(ValueError, match=re.escape("pass a list of module names")):
        LoRAConfig(rank=4, alpha=8, targets="[")
