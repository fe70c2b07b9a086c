"""Hypothesis profiles, what every test starts from, and what it must leave as it was."""

import gc
import logging
import os
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("deep", max_examples=1000, deadline=None)
settings.register_profile(
    "ci",
    max_examples=50,
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


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "run about one in N tests, chosen by their names: the same ones each time"
    parser.addoption("--one-in", type=int, default=1, metavar="N", help=about)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a sample of the tests, if one is asked for."""
    count = config.getoption("--one-in")
    kept = [item for item in items if not zlib.crc32(item.nodeid.encode()) % count]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[*set(items).difference(kept)])
        items[:] = kept


def pytest_collection_finish() -> None:
    """Keep what has been imported out of every garbage collection from now on: it is most of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _global_state() -> dict[str, Any]:
    names = ("", "dynalora_optim", "dynalora_adapters")
    return {
        "log levels": [logging.getLogger(name).level for name in names],
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "process group": torch.distributed.is_initialized(),
        "folder": os.getcwd(),  # noqa: PTH109
    }


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate, which the Trainer uses too, keeps its first settings for the process's life."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _leaves_no_trace() -> Iterator[None]:
    """Tests run in random order: what one leaves behind breaks another, which gets the blame."""
    before = _global_state()
    yield
    assert _global_state() == before, "this test changes what other tests start from"


CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test runs: on the CPU everywhere, and on a GPU where there is one."""
    return str(request.param)


@pytest.fixture
def lean_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every node of autograd that a LoRA layer makes of base and delta together."""
    from dynalora_adapters._lora_function import LoRAFunction

    found: list[int] = []
    forward = LoRAFunction.forward

    def counted(*args: Any) -> torch.Tensor:
        found.append(1)
        return forward(*args)

    monkeypatch.setattr(LoRAFunction, "forward", staticmethod(counted))
    return found
