"""Full-parameter training of a causal language model by blocks, in a plain PyTorch loop.

    python examples/full_finetune.py                      # SmolLM2-135M on movie reviews, by BAdam
    python examples/full_finetune.py --method adamw       # everything in every step, to compare
    python examples/full_finetune.py --method lisa --layers 4 --idle-state drop
    python examples/full_finetune.py --dtype bfloat16 --rounding stochastic --fused-backward
    python examples/full_finetune.py --model my-folder --data my-text.txt --save-every 10

With --save-every, run the same command again after a kill: it continues from the last checkpoint,
bit for bit. What the methods differ in is `optimizer_for`; the loop is `train`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple
from itertools import islice
from typing import Any

import torch
from _data import Batch, training_batches
from _full_methods import PERIOD, Settings, optimizer_for, parse
from _full_run import Progress, Run, checkpoint_of, resume, save
from _models import load_causal_lm
from _report import column, loss_cells, loss_numbers, versions, write_json
from _setup import DEVICE, TextWork
from quickstart import linear_schedule
from torch import nn
from tqdm.auto import tqdm

from dynalora_optim import DynamicAllocationOptimizer, StepMemory, measure_step


def prepare(settings: Settings, source: str) -> Run:
    """Build what a run consists of, as it is before its first step.

    Raises:
        OSError: There is no such model.
        ValueError: It does not go with the method.
    """
    model = load_causal_lm(source, getattr(torch, settings.dtype)).to(DEVICE).train()
    optimizer = optimizer_for(model, settings)
    torch.manual_seed(settings.seed)  # of dropout, where a model has some
    return Run(model, optimizer, linear_schedule(optimizer, settings.steps))


def train(run: Run, settings: Settings, batches: Iterator[Batch]) -> None:
    """Take the steps that are left: a plain loop, but for the steps that are weighed."""
    model, optimizer, progress = run.model, run.optimizer, run.progress
    for step, batch in left(batches, settings, progress):
        progress.trained.append(run.trained_parameters)
        if is_weighed(step, settings):
            memory = measure_step(model, batch, optimizer, loss=progress.loss)
            progress.weighed.append(astuple(memory))
        else:
            with timed(progress.seconds):
                progress.loss(model(**batch)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
        run.scheduler.step()
        if settings.save_every and (step + 1) % settings.save_every == 0:
            save(run, settings)


def is_weighed(step: int, settings: Settings) -> bool:
    """One step a period is: the second one, which holds the state that the first one made."""
    return step % max(2, settings.period or PERIOD) == 1


def left(
    batches: Iterator[Batch], settings: Settings, progress: Progress
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the steps to take and their batches, those of an uninterrupted run."""
    start = len(progress.losses)
    rest = islice(batches, start, None)
    seconds = 0.1 if sys.stderr.isatty() else 10  # a log file wants few lines
    with tqdm(rest, settings.method, settings.steps, initial=start, mininterval=seconds) as bar:
        for step, batch in enumerate(bar, start):
            yield step, inputs(batch)
            bar.set_postfix(loss=f"{progress.losses[-1]:.3f}", refresh=False)


def inputs(batch: Batch) -> dict[str, Any]:
    """Return what the model is called with; it would keep keys and values to generate with."""
    return {name: column.to(DEVICE) for name, column in batch.items()} | {"use_cache": False}


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)


@torch.no_grad()
def held_out_loss(model: nn.Module, blocks: Sequence[Batch]) -> float:
    """Return the mean over the blocks, which are of one length."""
    model.eval()
    alone = [{name: column[None] for name, column in block.items()} for block in blocks]
    losses = [float(model(**inputs(batch)).loss) for batch in alone]
    model.train()
    return statistics.fmean(losses)


def results(run: Run, after: float) -> dict[str, float]:
    """What the run was like, by flat keys."""
    progress = run.progress
    memory = StepMemory(*map(max, zip(*progress.weighed, strict=True)))
    return {
        **loss_numbers(progress.loss_before, after),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "trained_parameters": statistics.fmean(progress.trained),
        **{f"{name}_bytes": size for name, size in asdict(memory).items()},
        "seconds_per_step": statistics.median(progress.seconds),
    }


def table(found: dict[str, float]) -> str:
    """Lay out the numbers, a line each."""
    sizes = [name.removesuffix("_bytes") for name in found if name.endswith("_bytes")]
    return column(
        {
            **loss_cells(found),
            "parameters": f"{found['parameters']:,}",
            "trained in a step (mean)": f"{found['trained_parameters']:,.0f}",
            **{
                f"{n.replace('_', ' ')} (MiB)": f"{found[f'{n}_bytes'] / 2**20:,.1f}" for n in sizes
            },
            "seconds per step (median)": f"{found['seconds_per_step']:.3f}",
        }
    )


def export(run: Run, settings: Settings, work: TextWork) -> None:
    """Save the model where --model finds it, and the history of the allocation."""
    if isinstance(run.optimizer, DynamicAllocationOptimizer):
        run.optimizer.record.to_json(settings.output / "allocation.json")
        run.optimizer.record.plot(settings.output / "allocation.png")
        run.optimizer.close()
    run.model.save_pretrained(settings.output / "model")  # type: ignore[operator]
    work.tokenizer.save_pretrained(settings.output / "model")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print a table, and save the model."""
    try:
        settings = parse(arguments, (__doc__ or "").splitlines()[0])
        work = TextWork.prepare(settings)
        batches = training_batches(
            work.train, batch_size=settings.batch_size, steps=settings.steps, seed=settings.seed
        )
        run = prepare(settings, work.source)
        settings.output.mkdir(parents=True, exist_ok=True)
        if settings.save_every and checkpoint_of(settings).is_file():
            resume(run, settings)
    except (OSError, ValueError) as error:
        sys.exit(f"full_finetune: {error}")

    start = len(run.progress.losses)
    if not start:
        run.progress.loss_before = held_out_loss(run.model, work.held_out)
    train(run, settings, batches)
    found = results(run, held_out_loss(run.model, work.held_out))
    print(f"{settings.method} in {settings.dtype} on {DEVICE}, from step {start}")
    print(table(found))
    export(run, settings, work)
    write_json(
        settings.output / "summary.json",
        {
            **found,
            "training_loss": run.progress.losses,
            "settings": asdict(settings),
            "versions": versions(),
        },
    )
    print(f"results in {settings.output}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
