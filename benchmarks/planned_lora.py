"""Estimate the memory of LoRA on 8B, 70B and 405B for the whole process, in 4 bits, on any machine.

    python benchmarks/planned_lora.py [--output runs/planned_lora.jsonl]

Everything runs on the meta device: nothing is allocated, and no weights are needed. The layers are
those of bitsandbytes in 4 bits; embeddings, norms and the head stay in bfloat16. LoRA of rank 16 on
all linear layers in float32, AdamW, 1 x 4096 tokens. The least that a `Budget` can take is a step
with the lowest block active, every block checkpointed, and the state of idle modules dropped. The
same command continues a run that was killed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from _four_bit import four_bit
from _full_rows import checkpointed
from _full_shapes import PLANNED, QUICK, FullShape
from _measure import quiet
from _planned_tables import planned_lora_table
from _progress import Progress
from _stored import run_of, write
from torch import nn
from torch.optim import Optimizer

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import DynamicAllocationOptimizer, Pause, estimate_memory
from dynalora_optim.integrations.transformers import chunk_loss

PART = "planned LoRA"
LENGTH, RANK = 4096, 16


def _peft(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def _ours(model: nn.Module) -> nn.Module:
    return inject(model, LoRAConfig(rank=RANK, alpha=2 * RANK, targets="all-linear"))


def _in_chunks(model: nn.Module) -> nn.Module:
    chunk_loss(model)
    return model


def _adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def _wrapped(model: nn.Module) -> DynamicAllocationOptimizer:
    return DynamicAllocationOptimizer(_adamw(model), model, active=7, pause=Pause("drop"))


_pack = partial(four_bit, but="lm_head")
Change = Callable[[nn.Module], nn.Module]
ROWS: dict[str, tuple[Change, ...]] = {
    "peft LoRA, bfloat16 weights": (_peft,),
    "peft LoRA": (_pack, _peft),
    "peft, chunked loss": (_pack, _peft, _in_chunks),
    "peft, every block checkpointed": (_pack, _peft, checkpointed),
    "peft, every block checkpointed, chunked loss": (_pack, _peft, _in_chunks, checkpointed),
    "ours, all active, chunked loss": (_pack, _ours, _in_chunks),
    "ours, all active, every block checkpointed, chunked loss": (
        *(_pack, _ours, _in_chunks, checkpointed),
    ),
    "ours, the least of a Budget, chunked loss": (_pack, _ours, _in_chunks, checkpointed),
}
LEAST = [*ROWS][-1]
FOR_LARGER = [*ROWS][4:]  # the models beyond the first


def estimated(shape: FullShape, row: str) -> dict[str, int]:
    """Estimate the bytes of a step, by category."""
    model = shape.model().to("meta")
    for change in ROWS[row]:
        model = change(model)
    batch = shape.batch(model)
    if row != LEAST:
        return asdict(estimate_memory(model, batch, _adamw))
    lowest = [name for name in _wrapped(model).groups if ".layers.0." in name]
    return asdict(estimate_memory(model, batch, _wrapped, active=lowest))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny shape")
    parser.add_argument("--output", type=Path, default=Path("runs/planned_lora.jsonl"))
    options = parser.parse_args(arguments)
    run = run_of(__file__, arguments)
    progress = Progress(options.output.with_suffix(".progress.jsonl"), run)
    shapes = [replace(shape, length=LENGTH) for shape in PLANNED]
    rows: list[dict[str, Any]] = []
    with quiet(FutureWarning):
        for shape in [QUICK] if options.quick else shapes:
            for row in ROWS if shape.name in (PLANNED[0].name, QUICK.name) else FOR_LARGER:
                print(f"{shape.name}: {row}", flush=True)
                memory = progress.once((shape.name, row), partial(estimated, shape, row))
                rows.append({"row": row, "shape": shape.name, "memory": memory})
    print(planned_lora_table(write(options.output, PART, rows, run)), flush=True)
    progress.forget()


if __name__ == "__main__":
    main()
