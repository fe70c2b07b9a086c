"""Memory and speed of LoRA on Llama shapes: peft, peft with checkpointing, and ours.

Random bfloat16 weights built on the device, packed sequences (no padding, so no mask), LoRA of rank
16 on all linear layers in float32, fused AdamW. Each way of training is a line of `WAYS`. `SHAPES`
says which ways are measured for a shape.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from _chunked_rows import IN_CHUNKS, chunked_name, in_chunks, reference_peak
from _rows import ALL_ACTIVE, CHECKPOINTED, REFERENCE, UNWRAPPED, budget_name, injected, peft_model
from _runs import Run, Watched
from _shapes import LARGE, Shape, quick
from _torch_loss import before_the_head
from gpu._apart import Missing, Refused, Row, Values
from gpu._steps import Watch, summary
from torch import Tensor, nn
from torch.optim import Optimizer

from dynalora_optim import DynamicAllocationOptimizer

LIGER = "peft, every block checkpointed, Liger's loss"
PERIOD = 3  # of each choice: a counted step, a timed step, and a step with the next choice
CHUNK = 512  # rows whose logits exist at one time
BUDGETS = ((0.75, 1.0), (0.5, 1.0), (0.5, 0.6))
# With the loss in chunks; the memory is a share of the peak of peft's LoRA.
CHUNKED_BUDGETS = ((0.5, 0.6), (0.3, 0.6), (0.15, 0.6))


def fused_adamw(model: nn.Module) -> Optimizer:
    """Return AdamW with ``fused=True``, which is usual on a GPU."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True
    )


def packed(shape: Shape, model: nn.Module) -> dict[str, Tensor]:
    """Return a batch of full sequences, without padding or a mask."""
    return {name: x for name, x in shape.batch(model).items() if name != "attention_mask"}


def peft_lora(shape: Shape, *, every: int = 0) -> Run:
    """Train peft's LoRA, and checkpoint every n-th block, if ``every`` is n."""
    model = peft_model(shape, shape.bare(), every=every)
    return Run(model, fused_adamw(model), packed(shape, model))


class LigerRun(Run):
    """Computes the loss in chunks from the hidden states, with Liger's kernel."""

    def loss(self) -> Tensor:
        """Return the loss of the next token, as transformers computes it."""
        kernel = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
        hidden, head, labels = before_the_head(self.model, self.batch)
        loss: Tensor = kernel.LigerFusedLinearCrossEntropyLoss()(head, hidden, labels)
        return loss


def with_liger(shape: Shape) -> Run:
    """Train with peft, every block checkpointed, and Liger's loss, which needs least memory."""
    if shape.device != "cuda":
        raise Missing("Liger's kernels run only on a GPU")
    if importlib.util.find_spec("liger_kernel") is None:
        raise Missing("liger-kernel is not installed; run.sh --prepare downloads it")
    run = peft_lora(shape, every=1)
    return LigerRun(run.model, run.optimizer, run.batch)


def unwrapped(shape: Shape) -> Run:
    """Train our adapters without the wrapper."""
    model = injected(shape, shape.bare())
    return Run(model, fused_adamw(model), packed(shape, model))


def all_active(shape: Shape) -> Run:
    """Train our adapters with the wrapper, all of them active."""
    run = unwrapped(shape)
    run.optimizer = DynamicAllocationOptimizer(run.optimizer, run.model, active=1.0)
    return run


def all_active_chunked(shape: Shape) -> Run:
    """The same, with our loss in chunks."""
    return in_chunks(all_active(shape), CHUNK)


def of_pefts_peak(shape: Shape, *, memory: float, compute: float) -> Run:
    """Train with our loss in chunks and a budget of ``memory`` times peft's peak, in bytes."""
    limit = int(memory * reference_peak(shape, shape.bare()))
    gc.collect()  # peft's model
    if shape.device == "cuda":  # what torch keeps for later tensors would count as reserved
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return in_chunks(budgeted(shape, memory=limit, compute=compute), CHUNK)


def budgeted(shape: Shape, *, memory: float, compute: float) -> Run:
    """Train with a budget, with a new choice every `PERIOD` steps."""
    run = unwrapped(shape)
    run.draws, run.budget = shape.draws, Watched(memory=memory, compute=compute)
    run.optimizer = DynamicAllocationOptimizer(
        run.optimizer, run.model, allocator=run.budget, period=PERIOD
    )
    return run


Way = Callable[[Shape], Run]
WAYS: dict[str, Way] = {
    REFERENCE: peft_lora,
    CHECKPOINTED: partial(peft_lora, every=1),
    LIGER: with_liger,
    UNWRAPPED: unwrapped,
    ALL_ACTIVE: all_active,
    **{
        budget_name(memory, compute): partial(budgeted, memory=memory, compute=compute)
        for memory, compute in BUDGETS
    },
    f"{ALL_ACTIVE}{IN_CHUNKS}": all_active_chunked,
    **{
        chunked_name(memory, compute): partial(of_pefts_peak, memory=memory, compute=compute)
        for memory, compute in CHUNKED_BUDGETS
    },
}
FEWER = [REFERENCE, LIGER, ALL_ACTIVE, *(chunked_name(*budget) for budget in CHUNKED_BUDGETS)]


@dataclass(frozen=True)
class Case:
    """A shape, and what is measured for it.

    Attributes:
        ways: The ways of training: names in `WAYS`.
        steps: Number of steps for a way that makes no choices.
        counted: Number of choices to count for a way that makes choices.
    """

    name: str
    shape: Shape
    ways: list[str]
    steps: int = 15
    counted: int = 8


SHAPES = (
    Case("Llama-3.2-1B, 2 x 2048", replace(LARGE[0], rows=2, draws=18), list(WAYS), steps=20),
    Case("Llama-3.2-1B, 2 x 4096", replace(LARGE[0], rows=2, length=4096, draws=10), FEWER),
    Case("Llama-3.1-8B, 2 x 2048", replace(LARGE[1], rows=2, draws=8), FEWER, steps=10, counted=4),
)


def in_small(case: Case) -> Case:
    """Return small versions of the rows, which take less than a second each on a CPU."""
    small = quick(case.shape)
    config = partial(small.config, num_hidden_layers=4)
    shape = replace(small, config=config, device="cpu", rows=2, length=16, draws=2)
    return replace(case, shape=shape, steps=2, counted=2)


def measured(case: Case, way: str) -> Values:
    """Build a way of training and measure it."""
    shape = case.shape
    try:
        run = WAYS[way](shape)
        watch = Watch(run, shape.device, case.counted)
        watch.take(run.draws * PERIOD if run.budget else case.steps)
    except ValueError as problem:
        if "Budget(" not in str(problem):
            raise
        raise Refused(str(problem)) from problem
    return summary(watch, shape.rows * shape.length)


def rows(*, dry_run: bool) -> list[Row]:
    """Return the rows of all shapes."""
    cases = [in_small(case) for case in SHAPES] if dry_run else SHAPES
    return [
        Row(f"{case.name}: {way}", partial(measured, case, way), seconds=75)
        for case in cases
        for way in case.ways
    ]
