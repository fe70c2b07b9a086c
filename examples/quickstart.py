"""Fine-tune a small classifier with LoRA, with DynaLoRA, and on a budget, and compare.

    python examples/quickstart.py                        # all-MiniLM-L6-v2 on Rotten Tomatoes
    python examples/quickstart.py --model roberta-base --task sst2 --max-length 128 --lr 5e-4
    python examples/quickstart.py --model my-folder --data my-texts.csv

The training loop is `train`. All that the methods change in it is one line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from _models import head_modules, lora_targets
from _monitor import Measurements, Monitor, accuracy
from _report import peft_disagreement, plot_training, summary, table, versions, write_json
from _setup import Work, parse
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dynalora_adapters import LoRAConfig, inject, save_adapter
from dynalora_optim import Budget, DynamicAllocationOptimizer

TOLERANCE = 1e-5  # between peft's logits and ours


def adapted(work: Work) -> torch.nn.Module:
    """Put a LoRA adapter on every target of the pretrained model; the same start at every call."""
    model, rank = work.classifier(), work.settings.rank
    config = LoRAConfig(
        rank=rank,
        alpha=2 * rank,
        targets=work.settings.targets or lora_targets(model),
        trainable=head_modules(model),
    )
    return inject(model, config)


def methods(work: Work) -> dict[str, dict[str, Any] | None]:
    """What each run passes to DynamicAllocationOptimizer; plain LoRA does without."""
    settings = work.settings
    budget = Budget(memory=settings.memory, compute=settings.compute)
    return {"LoRA": None, "DynaLoRA": {"active": settings.active}, "Budget": {"allocator": budget}}


def train(model: torch.nn.Module, work: Work, method: str) -> tuple[Measurements, Optimizer]:
    """Train ``model`` in place; the methods differ in one line."""
    settings = work.settings
    optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
    if (options := methods(work)[method]) is not None:
        # The one line: the wrapper takes the optimizer's place, and nothing below knows of it.
        optimizer = DynamicAllocationOptimizer(
            optimizer, model, period=settings.period, seed=settings.seed, **options
        )

    scheduler = linear_schedule(optimizer, settings.steps)
    monitor = Monitor(
        model, optimizer, lambda: accuracy(model, work.held_out), steps=settings.steps
    )
    model.train()
    for batch in monitor.watch(work.batches(), label=method):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return monitor.measured, optimizer


def linear_schedule(optimizer: Optimizer, steps: int, warm_up: float = 0.1) -> LambdaLR:
    """Raise the rate over the first tenth of the steps and lower it to 0 over the others."""
    rising = max(1, round(warm_up * steps))

    def factor(step: int) -> float:
        return (step + 1) / rising if step < rising else (steps - step) / max(1, steps - rising)

    return LambdaLR(optimizer, factor)


def compare(work: Work) -> tuple[dict[str, Measurements], torch.nn.Module]:
    """Train with each method from the same start; return the last one's model too."""
    runs = {}
    for method in methods(work):
        model = adapted(work)
        runs[method], optimizer = train(model, work, method)
        if isinstance(optimizer, DynamicAllocationOptimizer):
            optimizer.record.plot(work.settings.output / f"allocation-{method.lower()}.png")
            optimizer.close()
    return runs, model


def check_with_peft(model: torch.nn.Module, work: Work) -> tuple[float | None, bool]:
    """Print whether peft reads the exported adapter as we do; return by how much it differs."""
    adapter = work.settings.output / "adapter"
    difference = peft_disagreement(model, work.classifier(), adapter, work.held_out)
    if difference is None:
        print("peft check: skipped, peft is not installed")
        return None, True
    agrees = difference <= TOLERANCE
    verdict = "agree with" if agrees else "DIFFER from"
    print(f"peft check: its logits {verdict} ours on the held-out rows (at most {difference:.1e})")
    return difference, agrees


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; return 0, or 1 where peft reads the adapter differently."""
    start = time.perf_counter()
    description = (__doc__ or "").splitlines()[0]
    settings = parse(arguments, description=description, output="runs/quickstart")
    try:
        work = Work.prepare(settings)
        settings.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"quickstart: {error}")

    runs, model = compare(work)
    save_adapter(model, settings.output / "adapter")
    plot_training(runs, settings.output / "training.png")
    print(table(runs))
    difference, agrees = check_with_peft(model, work)
    numbers = summary(runs) | {"seconds": time.perf_counter() - start}
    write_json(
        settings.output / "summary.json",
        {
            **numbers,
            "peft_difference": difference,
            "settings": asdict(settings),
            "versions": versions(),
        },
    )
    print(f"{numbers['seconds']:.0f} seconds; results in {settings.output}/")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
