"""benchmarks/quality/methods.py: every combination, on the real checkpoint, none left out."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

QUALITY = Path(__file__).parents[1] / "benchmarks" / "quality"


@pytest.fixture
def methods(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(QUALITY))
    return importlib.import_module("methods")


def test_no_method_is_left_out(methods):
    import dynalora_optim

    kinds = {type(allocator) for allocator in methods.ALLOCATORS.values()}
    measures = {type(make().measure) for make in methods.IMPORTANCES.values()}
    schedules = {type(schedule) for schedule in methods.SCHEDULES.values()}
    public = {name: getattr(dynalora_optim, name) for name in dynalora_optim.__all__}
    assert kinds == {kind for kind in public.values() if hasattr(kind, "select")} - {
        public["Allocator"],
        public["Budget"],
    }, "a Budget is in the quickstart"
    assert measures == {public[n] for n in ("ForwardNorm", "GradientNorm", "Sensitivity")}
    assert schedules == {public["Periodic"], public["Once"]}
    sizes = [len(methods.ADAPTERS), len(methods.IMPORTANCES), len(methods.ALLOCATORS), 2]
    assert len(methods.combinations()) == sizes[0] * sizes[1] * sizes[2] * sizes[3]


@pytest.mark.slow
def test_every_combination_runs_on_two_blocks_of_the_checkpoint(methods):
    try:
        methods.locate(methods.CLASSIFIER)
    except OSError as error:
        pytest.skip(f"the checkpoint cannot be had: {error}")
    run = subprocess.run(
        [sys.executable, QUALITY / "methods.py", "--layers", "2", "--steps", "3"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    total = len(methods.combinations())
    rows = [line for line in lines if "->" in line]
    assert len(rows) == total
    assert lines[-1].startswith(f"{total} of {total} combinations ran, 0 failed")
