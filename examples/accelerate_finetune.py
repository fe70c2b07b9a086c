"""Fine-tune a classifier with Accelerate, in one or more processes; continue a killed run.

    python examples/accelerate_finetune.py --save-every 50
    accelerate launch --num_processes 2 examples/accelerate_finetune.py --save-every 50

If a run is killed, run the same command again: it continues from the last checkpoint, with exactly
the same numbers.
"""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _assets import CLASSIFIER
from _common import (
    Batch,
    Sentences,
    accuracy,
    head_modules,
    linear_schedule,
    parser,
    placed,
    positive,
    share,
)
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader

from dynalora_adapters import LoRAConfig, inject, save_adapter
from dynalora_optim import Budget, DynamicAllocationOptimizer

ALLOCATORS = ("discounted", "topk", "threshold", "stochastic", "random", "round_robin", "budget")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and save checkpoints; return 0."""
    options = parse(arguments)
    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=options.seed)
    )
    try:
        sentences = Sentences.load(options)
        model, optimizer, loader, scheduler = prepare(accelerator, sentences, options)
    except (OSError, ValueError) as error:
        sys.exit(f"accelerate_finetune: {error}")
    options.output.mkdir(parents=True, exist_ok=True)
    set_seed(options.seed, device_specific=True)
    step = resume(accelerator, options.output)
    accelerator.print(f"{accelerator.num_processes} processes, from step {step}")

    model.train()
    for batch in batches(accelerator, loader, start=step, stop=options.steps):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        if step % options.save_every == 0:
            save(accelerator, options.output, step)

    model = accelerator.unwrap_model(model)
    finish(accelerator, model, optimizer.optimizer, sentences.held_out, options.output)
    return 0


def prepare(accelerator: Accelerator, sentences: Sentences, options: Namespace) -> tuple[Any, ...]:
    """Build model, optimizer, loader and scheduler. Only the optimizer differs from plain LoRA."""
    model = sentences.classifier(options.seed)
    lora = LoRAConfig(rank=8, alpha=16, targets=options.targets, trainable=head_modules(model))
    model = inject(model, lora)
    inner = torch.optim.AdamW(model.parameters(), lr=options.lr)
    optimizer = DynamicAllocationOptimizer(
        inner,
        model,
        period=options.period,
        **allocation(options),
        lr_time=options.lr_time,
        seed=options.seed,
    )
    # Accelerate steps the scheduler once per process in each step.
    scheduler = linear_schedule(optimizer, options.steps * accelerator.num_processes)
    loader: DataLoader[Batch] = DataLoader(
        sentences.train,  # type: ignore[arg-type]  # a list is a map-style dataset
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        # An own generator, because a new epoch must not change the global random numbers.
        generator=torch.Generator().manual_seed(options.seed),
    )
    prepared: tuple[Any, ...] = accelerator.prepare(model, optimizer, loader, scheduler)
    return prepared


def allocation(options: Namespace) -> dict[str, Any]:
    """Return the chosen allocator. Two of them decide themselves how many modules are active."""
    if options.allocator == "budget":
        return {"allocator": Budget(options.memory, options.compute)}
    if options.allocator == "threshold":
        return {"allocator": "threshold"}
    return {"allocator": options.allocator, "active": options.active}


def batches(accelerator: Accelerator, loader: Any, *, start: int, stop: int) -> Iterator[Batch]:
    """Yield the batches of steps start .. stop - 1, the same as in an uninterrupted run."""
    step = start
    while step < stop:
        epoch, offset = divmod(step, len(loader))
        loader.set_epoch(epoch)
        rest = accelerator.skip_first_batches(loader, offset) if offset else loader
        for batch in rest:
            if step == stop:
                return
            yield batch
            step += 1


def save(accelerator: Accelerator, output: Path, step: int) -> None:
    """Write a checkpoint to a temporary folder, then rename it, so that it is never incomplete."""
    beside = output / f".step-{step}.tmp"
    accelerator.save_state(str(beside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        beside.rename(output / f"step-{step}")
        for older in checkpoints(output)[:-1]:
            shutil.rmtree(older)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, output: Path) -> int:
    """Load the last checkpoint, if there is one. Return how many steps are done."""
    if accelerator.is_main_process:
        for half in output.glob(".step-*.tmp"):
            shutil.rmtree(half)
    accelerator.wait_for_everyone()
    found = checkpoints(output)
    if not found:
        return 0
    accelerator.load_state(str(found[-1]))
    return step_of(found[-1])


def checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints in ``output``, oldest first."""
    return sorted(output.glob("step-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return how many steps were done when it was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def finish(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: DynamicAllocationOptimizer,
    held_out: list[Batch],
    output: Path,
) -> None:
    """Evaluate and export, in the main process only; the others wait for it."""
    if accelerator.is_main_process:
        found = accuracy(model, (placed(batch, accelerator.device) for batch in held_out))
        print(f"held-out accuracy {found:.3f}")
        save_adapter(model, output / "adapter")
        optimizer.record.to_json(output / "record.json")
        summary = {"accuracy": found, "num_processes": accelerator.num_processes}
        (output / "summary.json").write_text(json.dumps(summary), "utf-8")
    # Together: a process that ends right after a collective call can abort, as gloo's threads may
    # still hold tensors when Python is gone (pytorch/pytorch#190489).
    accelerator.wait_for_everyone()
    accelerator.end_training()


def parse(arguments: Sequence[str] | None) -> Namespace:
    """Read the command line: the options of all examples, and those of this one."""
    reader = parser(
        __doc__,
        model=CLASSIFIER,
        steps=300,
        batch_size=16,
        length=48,
        lr=4e-3,
        period=20,
        output="runs/accelerate",
    )
    add = reader.add_argument
    add("--targets", nargs="+", default=["query", "value"], metavar="NAME", help="layers to adapt")
    add("--active", type=share, default=2 / 3, help="active modules: a number or a share, 2/3")
    add("--allocator", choices=ALLOCATORS, default="discounted", help="chooses the active modules")
    add("--memory", type=float, default=0.40, help="of the Budget: share of LoRA's peak")
    add("--compute", type=float, default=0.6, help="of the Budget: share of LoRA's FLOPs")
    add("--lr-time", choices=("global", "local"), default="global", help="clock of the rate")
    add("--save-every", type=positive, default=100, help="steps")
    return reader.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
