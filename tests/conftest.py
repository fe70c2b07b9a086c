"""Hypothesis profiles and what every test starts from."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# Few examples, always the same: what a set of versions breaks, it breaks in any example.
settings.register_profile("smoke", max_examples=5, deadline=None, derandomize=True)
# Tiny models: a second thread costs more than it brings.
torch.set_num_threads(1)

settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
