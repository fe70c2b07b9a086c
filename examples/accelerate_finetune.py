"""Fine-tune a classifier with Accelerate, on one process or many, and go on where a run was killed.

    python examples/accelerate_finetune.py --save-every 50
    accelerate launch --num_processes 2 examples/accelerate_finetune.py --save-every 50

Run the same command again after a kill: it continues from the last checkpoint, bit for bit.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _data import Batch
from _monitor import accuracy
from _report import write_json
from _setup import Settings, Work, parser, positive
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from quickstart import adapted, linear_schedule
from torch.utils.data import DataLoader

from dynalora_adapters import save_adapter
from dynalora_optim import Allocator, Budget, DynamicAllocationOptimizer

ALLOCATORS = ("discounted", "topk", "threshold", "stochastic", "random", "round_robin", "budget")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, saving as we go; return 0."""
    settings, options = parse(arguments)
    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=settings.seed
        )
    )
    work = Work.prepare(settings, device="cpu")
    model, optimizer, loader, scheduler = prepare(accelerator, work, options)
    set_seed(settings.seed, device_specific=True)
    step = resume(accelerator, settings.output)
    accelerator.print(f"{accelerator.num_processes} processes, from step {step}")

    model.train()
    for batch in batches(accelerator, loader, start=step, stop=settings.steps):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        if step % options["save_every"] == 0:
            save(accelerator, settings.output, step)

    finish(accelerator, accelerator.unwrap_model(model), optimizer.optimizer, work)
    return 0


def prepare(accelerator: Accelerator, work: Work, options: dict[str, Any]) -> tuple[Any, ...]:
    """Build what a run consists of; the optimizer is the one line that differs from LoRA."""
    settings = work.settings
    model = adapted(work)
    inner = torch.optim.AdamW(model.parameters(), lr=settings.lr)
    optimizer = DynamicAllocationOptimizer(
        inner,
        model,
        active=settings.active,
        period=settings.period,
        allocator=allocator(settings, options["allocator"]),
        lr_time=options["lr_time"],
        seed=settings.seed,
    )
    # Accelerate moves the scheduler once for every process.
    scheduler = linear_schedule(optimizer, settings.steps * accelerator.num_processes)
    loader: DataLoader[Batch] = DataLoader(
        work.examples,  # type: ignore[arg-type]  # a list is a map-style dataset
        batch_size=settings.batch_size,
        shuffle=True,
        drop_last=True,
        # Its own random numbers: a loader that begins anew must not disturb the global ones.
        generator=torch.Generator().manual_seed(settings.seed),
    )
    prepared: tuple[Any, ...] = accelerator.prepare(model, optimizer, loader, scheduler)
    return prepared


def allocator(settings: Settings, name: str) -> str | Allocator:
    """Return the allocator of this name."""
    return Budget(settings.memory, settings.compute) if name == "budget" else name


def batches(accelerator: Accelerator, loader: Any, *, start: int, stop: int) -> Iterator[Batch]:
    """Yield the batches of steps start .. stop - 1: those of an uninterrupted run."""
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
    """Write a checkpoint beside and rename it, so that a killed run leaves no half of one."""
    beside = output / f".step-{step}.tmp"
    accelerator.save_state(str(beside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        beside.rename(output / f"step-{step}")
        for older in checkpoints(output)[:-1]:
            shutil.rmtree(older)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, output: Path) -> int:
    """Load the last checkpoint, if there is one; return the steps done."""
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
    """Return the checkpoints in ``output``, the latest last."""
    return sorted(output.glob("step-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the steps done when it was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def finish(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: DynamicAllocationOptimizer,
    work: Work,
) -> None:
    """Evaluate and export, on one process."""
    if accelerator.is_main_process:
        output = work.settings.output
        held_out = [
            {name: field.to(accelerator.device) for name, field in batch.items()}
            for batch in work.held_out
        ]
        found = accuracy(model, held_out)
        print(f"held-out accuracy {found:.3f}")
        save_adapter(model, output / "adapter")
        optimizer.record.to_json(output / "record.json")
        write_json(
            output / "summary.json",
            {"accuracy": found, "num_processes": accelerator.num_processes},
        )
    accelerator.end_training()


def parse(arguments: Sequence[str] | None) -> tuple[Settings, dict[str, Any]]:
    """Read the command line: what all examples take, and what this one adds."""
    reader = parser((__doc__ or "").splitlines()[0], "runs/accelerate")
    reader.add_argument("--allocator", choices=ALLOCATORS, default="discounted", help="who is next")
    reader.add_argument("--lr-time", choices=("global", "local"), default="global")
    reader.add_argument("--save-every", type=positive, default=100, help="steps")
    values = vars(reader.parse_args(arguments))
    options = {name: values.pop(name) for name in ("allocator", "lr_time", "save_every")}
    settings = Settings(**values)
    settings.output.mkdir(parents=True, exist_ok=True)
    return settings, options


if __name__ == "__main__":
    sys.exit(main())
