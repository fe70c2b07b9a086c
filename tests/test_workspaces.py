"""Memory of kernels that no tensor shows: what is counted is what was measured on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dynalora_optim import LiveBytes
from dynalora_optim._base import workspaces
from dynalora_optim._base.workspaces import workspace

STORED = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "gpu"
SHAPES = {
    "1B, 2 x 2048": (2, 32, 2048, 64),
    "1B, 2 x 4096": (2, 32, 4096, 64),
    "8B, 2 x 2048": (2, 32, 2048, 128),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "named"), [("flash", "flash"), ("cudnn", "cuDNN")])
def test_what_is_counted_is_what_was_measured_to_256_bytes(kind, named, shape):
    lines = (STORED / "workspaces.jsonl").read_text("utf-8").splitlines()
    rows = {row["row"]: row["values"] for row in map(json.loads, lines)}
    measured = rows[f"attention {shape}"][f"{named}: backward_hidden"]
    counted = workspace(kind, torch.empty(SHAPES[shape], device="meta"))
    assert measured <= counted <= measured + 256


def test_sizes_are_rounded_up_as_kernels_do():
    whole = workspace("flash", torch.empty(1, 2, 128, 64))
    assert workspace("flash", torch.empty(1, 2, 100, 60)) == whole


def attention_peak() -> tuple[int, int]:
    """The counted peak of a backward of attention, and the bytes of the queries."""
    query, key, value = (torch.randn(1, 2, 64, 32).requires_grad_() for _ in range(3))
    with LiveBytes() as memory:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        memory.restart()
        out.sum().backward()
    return memory.peak, query.numel() * 4


def test_the_peak_has_it_where_the_kernel_runs(monkeypatch):
    """On a CPU the kernel takes nothing; here its backward stands for that of a GPU."""
    plain, _ = attention_peak()
    backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
    if backward is None:
        pytest.skip("this torch has no fused attention on a CPU")
    monkeypatch.setitem(workspaces._KERNELS, backward, "flash")
    assert attention_peak()[0] == plain, "not on a CPU"
    monkeypatch.setattr(workspaces, "_DEVICE", "cpu")
    peak, of_queries = attention_peak()
    assert peak >= plain + 3 * of_queries
