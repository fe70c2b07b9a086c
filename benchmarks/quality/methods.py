"""Run all combinations of importance, allocator and schedule on LoRA and VeRA for a few steps.

    python benchmarks/quality/methods.py                     # all-MiniLM-L6-v2 on Rotten Tomatoes

This shows what each combination does, not how well it learns: how many modules are active, how many
updates each module has had, and how the loss changes. All rows use the same batches.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from _models import load_classifier, locate, lora_targets
from _shared import (
    CLASSIFIER,
    Batch,
    encode,
    head_modules,
    pretrained,
    read_csv,
    split_tenth,
    training_batches,
)
from tqdm import tqdm

from dynalora_adapters import LoRAConfig, VeRAConfig, inject
from dynalora_optim import (
    Allocator,
    Bounded,
    DiscountedStochastic,
    DynamicAllocationOptimizer,
    Ema,
    ForwardNorm,
    GradientNorm,
    ImportanceTracker,
    Once,
    Periodic,
    RoundRobin,
    Schedule,
    Sensitivity,
    Stochastic,
    Threshold,
    TopK,
    UniformRandom,
)

ADAPTERS = ("LoRA", "VeRA")
RATES = {"LoRA": 2e-3, "VeRA": 2e-2}  # VeRA trains scales, which need a larger rate
IMPORTANCES = {
    "forward": lambda: ImportanceTracker(ForwardNorm()),
    "forward, delta": lambda: ImportanceTracker(ForwardNorm(p=1, part="delta"), window=Ema(0.9)),
    "gradient": lambda: ImportanceTracker(GradientNorm()),
    "gradient, probed": lambda: ImportanceTracker(GradientNorm(), probe=True),
    "sensitivity": lambda: ImportanceTracker(Sensitivity()),
}
ALLOCATORS: dict[str, Allocator] = {
    "top-k": TopK(),
    "threshold": Threshold(0.5),
    "stochastic": Stochastic(),
    "bernoulli": Stochastic("bernoulli"),
    "discounted": DiscountedStochastic(),
    "random": UniformRandom(),
    "round robin": RoundRobin(),
    "bounded": Bounded("discounted", 2),
}
SCHEDULES: dict[str, Schedule] = {"every 2": Periodic(2), "once at 3": Once(3)}


@dataclass(frozen=True)
class Combination:
    """The options of one row, by their names above."""

    adapter: str
    importance: str
    allocator: str
    schedule: str


@dataclass(frozen=True)
class Outcome:
    """The results of one row."""

    active: list[int]  # modules active in each period
    updates: list[int]  # of each module
    losses: list[float]


def combinations() -> list[Combination]:
    """Return every combination."""
    return [Combination(*c) for c in product(ADAPTERS, IMPORTANCES, ALLOCATORS, SCHEDULES)]


def adapted(model: torch.nn.Module, adapter: str) -> torch.nn.Module:
    """Put an adapter on a copy of ``model``."""
    model = copy.deepcopy(model)
    targets, trainable = lora_targets(model), head_modules(model)
    if adapter == "LoRA":
        return inject(model, LoRAConfig(rank=8, alpha=16, targets=targets, trainable=trainable))
    return inject(model, VeRAConfig(rank=64, targets=targets, trainable=trainable))


def run(model: torch.nn.Module, batches: Sequence[Batch], combination: Combination) -> Outcome:
    """Train the adapted ``model`` on the batches."""
    torch.manual_seed(0)  # for dropout
    optimizer = DynamicAllocationOptimizer(
        torch.optim.AdamW(model.parameters(), lr=RATES[combination.adapter]),
        model,
        importance=IMPORTANCES[combination.importance](),
        allocator=ALLOCATORS[combination.allocator],
        period=SCHEDULES[combination.schedule],
    )
    losses = []
    model.train()
    for batch in batches:
        optimizer.tracker.attention_mask = batch["attention_mask"]
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    optimizer.close()
    active = [len(entry.chosen) for entry in optimizer.record]
    return Outcome(active, list(optimizer.record.counts().values()), losses)


def row(combination: Combination, outcome: Outcome) -> str:
    """Return one line of the table."""
    c = combination
    active = " ".join(map(str, outcome.active))
    updates = " ".join(map(str, outcome.updates))
    losses = f"{outcome.losses[0]:.3f} -> {outcome.losses[-1]:.3f}"
    return (
        f"{c.adapter:7} {c.importance:17} {c.allocator:12} {c.schedule:10} {active:12} "
        f"{updates:{3 * len(outcome.updates)}} {losses}"
    )


def header(modules: int) -> str:
    """Return the line above the table."""
    return (
        f"{'adapter':7} {'importance':17} {'allocator':12} {'schedule':10} {'active':12} "
        f"{f'updates of the {modules} modules':{3 * modules}} loss"
    )


def outcomes(
    model: torch.nn.Module, batches: Sequence[Batch]
) -> Iterator[tuple[Combination, Outcome]]:
    """Run every combination."""
    models = {adapter: adapted(model, adapter) for adapter in ADAPTERS}
    starts = {adapter: trainable(model) for adapter, model in models.items()}
    with tqdm(combinations(), unit="run", disable=None) as progress:
        for combination in progress:
            model = models[combination.adapter]
            model.load_state_dict(starts[combination.adapter], strict=False)
            yield combination, run(model, batches, combination)


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the parameters that training changes."""
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table. Return 1 if a combination failed, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=CLASSIFIER, help="the default model or a local folder")
    parser.add_argument("--layers", type=int, default=None, help="use only this many blocks")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of each run")
    settings = parser.parse_args(arguments)
    start = time.perf_counter()
    torch.set_num_threads(1)  # a second thread does not help with small batches

    source = locate(settings.model)
    tokenizer = pretrained("AutoTokenizer", source)
    rows = random.Random(0).sample(split_tenth(read_csv(None))[0], 64)
    examples = encode(tokenizer, rows, 16)
    batches = list(training_batches(examples, batch_size=4, steps=settings.steps, seed=0))
    torch.manual_seed(0)
    model = load_classifier(
        source, num_labels=2, pad_token_id=tokenizer.pad_token_id, layers=settings.layers
    )

    failed = 0
    for i, (combination, outcome) in enumerate(outcomes(model, batches)):
        if i == 0:
            tqdm.write(header(len(outcome.updates)))
        tqdm.write(row(combination, outcome))
        failed += not all(map(torch.isfinite, map(torch.tensor, outcome.losses)))
    total = len(combinations())
    seconds = time.perf_counter() - start
    print(f"{total - failed} of {total} combinations ran, {failed} failed; {seconds:.0f} seconds")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
