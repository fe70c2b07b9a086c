"""Full-parameter training of the 1B shape: AdamW, the badam package, and ours.

Random bfloat16 weights, packed sequences, fused AdamW. One block trains at a time, on float32
copies. After every `PERIOD` steps the next block trains; the time of this switch is measured
separately. Each way of training is a line of `WAYS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from _badam import block_optimizer, is_installed
from _full_rows import ADAMW, FUSED, KEEP, OFFLOAD, OURS, PACKAGE
from _runs import Run
from _shapes import Shape
from gpu._apart import Missing, Row, Values
from gpu._steps import Watch, summary
from gpu.lora import SHAPES, fused_adamw, in_small, packed
from torch import nn

from dynalora_optim import Backward, badam

PERIOD = 4
VISITS = 6
CASE = SHAPES[0]


def package(model: nn.Module) -> Any:
    """Wrap AdamW with the optimizer of the badam package."""
    if not is_installed():
        raise Missing("badam is not installed; run.sh --prepare downloads it")
    return block_optimizer(
        fused_adamw(model), model, switch_block_every=PERIOD, switch_mode="descending"
    )


def ours(model: nn.Module, **options: Any) -> Any:
    """Wrap AdamW with our preset `badam`."""
    return badam(model, fused_adamw(model), period=PERIOD, **options)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    ADAMW: fused_adamw,
    PACKAGE: package,
    OURS: ours,
    OFFLOAD: partial(ours, pause="offload"),
    KEEP: partial(ours, pause="keep"),
    FUSED: partial(ours, backward=Backward(fused=True)),
}


def measured(shape: Shape, way: str, visits: int) -> Values:
    """Train ``visits`` blocks, one after the other, and measure."""
    model = shape.bare()
    run = Run(model, WAYS[way](model), packed(shape, model))
    watch = Watch(run, shape.device, most_counted=1)
    watch.take(visits * PERIOD)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"weights": weights, **summary(watch, shape.rows * shape.length)}


def rows(*, dry_run: bool) -> list[Row]:
    """Return all rows."""
    shape, visits = CASE.shape, VISITS
    if dry_run:
        shape, visits = in_small(CASE).shape, 2
    return [Row(way, partial(measured, shape, way, visits), seconds=40) for way in WAYS]
