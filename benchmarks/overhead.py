"""What knowing costs: the importance tracker and the wrapper, on a MiniLM training step.

    python benchmarks/overhead.py

All rows train LoRA (rank 8 on query and value) over a BertModel of all-MiniLM-L6-v2's shape, with
random weights, batch 16 x 48 tokens, and are timed side by side. Rows with everything active differ
from plain AdamW in the wrapper and the measure alone. Operations are exact, times are medians of
CPU seconds, which other processes stretch less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import peft
import torch
from _measure import dispatched_ops, hardware, markdown, median_seconds
from torch.optim import Optimizer
from transformers import BertConfig, BertForSequenceClassification

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import DynamicAllocationOptimizer, ImportanceTracker

SHAPE = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30522,
}


def minilm() -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = BertForSequenceClassification(BertConfig(**SHAPE, num_labels=2))
    return model


def ours() -> torch.nn.Module:
    config = LoRAConfig(rank=8, alpha=16, targets=["query", "value"], trainable=["classifier"])
    return inject(minilm(), config)


def pefts() -> torch.nn.Module:
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    model: torch.nn.Module = peft.get_peft_model(minilm(), config)
    return model


def training_step(
    build: Callable[[], torch.nn.Module], wrap: Callable[[Optimizer, torch.nn.Module], Optimizer]
) -> Callable[[], object]:
    """One step of the loop: forward, backward, update."""
    model = build().train()
    optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
    tokens = torch.randint(0, SHAPE["vocab_size"], (16, 48))
    batch = {"input_ids": tokens, "labels": torch.randint(0, 2, (16,))}

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def wrapped(importance: str, every: int = 1, active: float = 1.0) -> Callable[..., Optimizer]:
    def wrap(optimizer: Optimizer, model: torch.nn.Module) -> Optimizer:
        tracker = ImportanceTracker(importance, every=every)
        return DynamicAllocationOptimizer(optimizer, model, active=active, importance=tracker)

    return wrap


def plain(optimizer: Optimizer, model: torch.nn.Module) -> Optimizer:
    return optimizer


ROWS = {
    "peft LoRA, AdamW": (pefts, plain),
    "our LoRA, AdamW": (ours, plain),
    "wrapped, not measured": (ours, wrapped("forward", every=10**9)),
    "wrapped, forward measure every 4th step": (ours, wrapped("forward", every=4)),
    "wrapped, forward measure": (ours, wrapped("forward")),
    "wrapped, gradient measure": (ours, wrapped("gradient")),
    "wrapped, forward measure, 2/3 active": (ours, wrapped("forward", active=2 / 3)),
}
REFERENCE = "our LoRA, AdamW"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = {name: training_step(*row) for name, row in ROWS.items()}
    for step in steps.values():
        step()  # makes the optimizer's state, which later steps do not
    ops = {name: dispatched_ops(step, repeats=4) for name, step in steps.items()}
    seconds = median_seconds(steps, rounds=arguments.rounds, clock=time.process_time)
    print(f"{hardware()}; {arguments.rounds} rounds\n")
    print(
        markdown(
            ["row", "dispatched ops a step", "median time, ratio", "median ms"],
            [
                [name, f"{ops[name]:.0f}", f"{s / seconds[REFERENCE]:.3f}", f"{s * 1e3:.1f}"]
                for name, s in seconds.items()
            ],
        )
    )


if __name__ == "__main__":
    main()
