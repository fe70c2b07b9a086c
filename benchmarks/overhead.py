"""Measure the overhead of the importance tracker, of the wrapper, and of a reallocation.

    pip install --no-deps badam
    python benchmarks/overhead.py [--output runs/overhead.jsonl]

The first table is about a real step: LoRA (rank 8 on query and value) on a BertModel with the shape
of all-MiniLM-L6-v2 and random weights, with a batch of 16 x 48 tokens. The other tables are about
many small groups: chains of 24, 144 and 512 small layers with LoRA. They show the costs that do not
depend on the size of a layer. If the badam package is installed, they contain it as well.

The rows of a table are timed in turn. Operations are exact counts. Times are medians of CPU
seconds, which depend less on other processes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, cast

import peft
import torch
from _badam import block_optimizer, is_installed
from _measure import dispatched_ops, median_seconds, threads
from _overhead_tables import REFERENCE, STEP, group_table, step_table
from _stored import run_of, write
from torch import nn
from torch.optim import Optimizer
from transformers import BertConfig, BertForSequenceClassification

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import DynamicAllocationOptimizer, ImportanceTracker

Wrap = Callable[[Optimizer, nn.Module], Optimizer]

SHAPE = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30522,
}
GROUPS = (24, 144, 512)
WIDTH, BATCH = 32, 16  # sizes of the chain
NEVER = 10**9


def minilm() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = BertForSequenceClassification(BertConfig(**SHAPE, num_labels=2))
    return model


def ours() -> nn.Module:
    config = LoRAConfig(rank=8, alpha=16, targets=["query", "value"], trainable=["classifier"])
    return inject(minilm(), config)


def pefts() -> nn.Module:
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    model: nn.Module = peft.get_peft_model(minilm(), config)
    return model


class Step:
    """A training step: forward, backward, update.

    Attributes:
        updates: The CPU seconds of `Optimizer.step`, one number per call.
    """

    def __init__(self, optimizer: Optimizer, loss: Callable[[], torch.Tensor]) -> None:
        self._optimizer, self._loss = optimizer, loss
        self.updates: list[float] = []

    def __call__(self) -> None:
        self._loss().backward()  # type: ignore[no-untyped-call]
        start = time.process_time()
        self._optimizer.step()
        self.updates.append(time.process_time() - start)
        self._optimizer.zero_grad()


def minilm_step(build: Callable[[], nn.Module], wrap: Wrap) -> Step:
    model = build().train()
    tokens = torch.randint(0, SHAPE["vocab_size"], (16, 48))
    batch = {"input_ids": tokens, "labels": torch.randint(0, 2, (16,))}
    return Step(wrap(adamw(model), model), lambda: model(**batch).loss)


class Chain(nn.Module):
    """``h + W h``, repeated ``length`` times."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(length))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            h = h + layer(h) / len(self.layers)
        return h


def chain_step(length: int, wrap: Wrap, *, device: str = "cpu") -> Step:
    torch.manual_seed(0)
    targets = [f"layers.{i}" for i in range(length)]
    model = inject(Chain(length), LoRAConfig(rank=8, alpha=16, targets=targets)).train().to(device)
    x = torch.randn(BATCH, WIDTH, device=device)
    return Step(wrap(adamw(model), model), lambda: cast(torch.Tensor, model(x)).square().mean())


def adamw(model: nn.Module) -> Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-3, fused=parameters[0].is_cuda or None)


def plain(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    return optimizer


def wrapped(importance: str, every: int = 1, *, active: float = 1.0, **options: Any) -> Wrap:
    def wrap(optimizer: Optimizer, model: nn.Module) -> Optimizer:
        tracker = ImportanceTracker(importance, every=every)
        return DynamicAllocationOptimizer(
            optimizer, model, active=active, importance=tracker, **options
        )

    return wrap


def in_turn(period: int) -> Wrap:
    """Train one group at a time, as BAdam does, and drop its state afterwards."""
    return wrapped("forward", NEVER, active=1, allocator="round_robin", pause="drop", period=period)


def package(period: int) -> Wrap:
    """Wrap by the badam package in its LoRA mode, with one group per block."""

    def wrap(optimizer: Optimizer, model: nn.Module) -> Optimizer:
        prefixes = [[f"{name}."] for name, m in model.named_modules() if hasattr(m, "lora_A")]
        built: Optimizer = block_optimizer(
            optimizer, model, prefixes, switch_block_every=period, switch_mode="ascending"
        )
        return built

    return wrap


STEP_ROWS = {
    "peft LoRA, AdamW": (pefts, plain),
    REFERENCE: (ours, plain),
    "wrapped, not measured": (ours, wrapped("forward", NEVER)),
    "wrapped, forward measure every 4th step": (ours, wrapped("forward", 4)),
    "wrapped, forward measure": (ours, wrapped("forward")),
    "wrapped, gradient measure": (ours, wrapped("gradient")),
    "wrapped, forward measure, 2/3 active": (ours, wrapped("forward", active=2 / 3)),
}

# Each row with a second version that reallocates after every step, if the row reallocates.
GROUP_ROWS: dict[str, tuple[Wrap, Wrap | None]] = {
    REFERENCE: (plain, None),
    "wrapped, not measured": (wrapped("forward", NEVER), None),
    "wrapped, forward measure": (wrapped("forward"), None),
    "wrapped, gradient measure": (wrapped("gradient"), None),
    "wrapped, forward measure, 2/3 active": (
        wrapped("forward", active=2 / 3, period=NEVER),
        wrapped("forward", active=2 / 3, period=1),
    ),
    "wrapped, one active in turn": (in_turn(NEVER), in_turn(1)),
}
PACKAGE = "badam package, one active in turn"


def group_rows() -> dict[str, tuple[Wrap, Wrap | None]]:
    if not is_installed():
        return GROUP_ROWS
    return {**GROUP_ROWS, PACKAGE: (package(NEVER), package(1))}


def step_rows(rounds: int) -> list[dict[str, Any]]:
    """Measure the real step."""
    steps = {name: minilm_step(*row) for name, row in STEP_ROWS.items()}
    ops = counted(steps)
    seconds = median_seconds(steps, rounds=rounds, clock=time.process_time)
    return [{"row": name, "ops": ops[name], "seconds": seconds[name]} for name in steps]


def measured_groups(groups: int, rounds: int) -> list[dict[str, Any]]:
    """Measure the chain. For rows that reallocate, also measure an update with a reallocation."""
    rows = group_rows()
    steps: dict[str, Step] = {}
    for name, (wrap, reallocating) in rows.items():
        steps[name] = chain_step(groups, wrap)
        if reallocating is not None:
            steps[_twin(name)] = chain_step(groups, reallocating)
    with redirect_stdout(StringIO()):  # the package prints each switch
        ops = counted(steps)
        seconds = median_seconds(steps, rounds=rounds, clock=time.process_time)
    updates = {name: statistics.median(step.updates[-rounds:]) for name, step in steps.items()}
    return [
        {
            "row": name,
            "ops": ops[name],
            "seconds": seconds[name],
            "update": updates[name],
            "reallocating_update": updates.get(_twin(name)),
        }
        for name in rows
    ]


def _twin(name: str) -> str:
    return f"{name}, reallocating after every step"


def counted(steps: dict[str, Step]) -> dict[str, float]:
    for step in steps.values():
        step()  # creates the optimizer state
    return {name: dispatched_ops(step, repeats=4) for name, step in steps.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--groups", type=int, nargs="*", default=GROUPS, help="none: no chains")
    parser.add_argument("--output", type=Path, default=Path("runs/overhead.jsonl"))
    options = parser.parse_args(arguments)
    with threads(options.threads):
        run = run_of(__file__, arguments)
        print(step_table(write(options.output, STEP, step_rows(options.rounds), run)))
        for groups in options.groups:
            rows = measured_groups(groups, options.rounds)
            part = f"{groups} groups"
            print(f"\n{part}\n\n{group_table(write(options.output, part, rows, run))}")


if __name__ == "__main__":
    main()
