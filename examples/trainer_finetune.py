"""Fine-tune a causal language model with transformers' Trainer and DynaLoRA, or on a budget.

    python examples/trainer_finetune.py                   # SmolLM2-135M on movie reviews
    python examples/trainer_finetune.py --memory 0.5 --compute 0.6
    python examples/trainer_finetune.py --model my-folder --data my-text.txt
    torchrun --nproc_per_node 2 examples/trainer_finetune.py --save-every 10

With --save-every, run the same command again after a kill: it continues from the last checkpoint,
bit for bit. All that is not the Trainer's own is `trainer_for`'s last two lines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _data import Batch
from _models import load_causal_lm, lora_targets
from _report import column, loss_cells, loss_numbers, versions, write_json
from _setup import TextSettings, TextWork, positive, share, text_parser

from dynalora_adapters import LoRAConfig, inject, save_adapter
from dynalora_optim import Budget, DynamicAllocationOptimizer


@dataclass(frozen=True)
class Settings(TextSettings):
    """The command line."""

    targets: list[str] | None
    lr: float
    rank: int
    active: float
    period: int
    memory: float | None
    compute: float | None

    @property
    def allocation(self) -> dict[str, Any]:
        """Options of DynamicAllocationOptimizer."""
        common = {"period": self.period, "seed": self.seed}
        if self.memory is None and self.compute is None:
            return {"active": self.active, **common}
        memory = 1.0 if self.memory is None else self.memory
        return {"allocator": Budget(memory, self.compute), **common}


def trainer_for(
    model: torch.nn.Module, settings: Settings, train: list[Batch], held_out: list[Batch]
) -> Any:
    """Return a Trainer of the adapted ``model``."""
    # Here, and not above: on import they look at whether the hub may be asked.
    from transformers import Trainer, TrainingArguments

    from dynalora_optim.integrations.transformers import AllocationCallback, dynalora_optimizer

    args = TrainingArguments(
        str(settings.output),
        max_steps=settings.steps,
        learning_rate=settings.lr,
        warmup_steps=max(1, settings.steps // 10),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        logging_steps=max(1, settings.steps // 10),
        eval_on_start=True,  # evaluate() before train() keeps the Trainer from using DDP
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 1,
        save_total_limit=2,  # the one before as well: a kill may leave half of the last
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
    )
    return Trainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=held_out,
        optimizer_cls_and_kwargs=dynalora_optimizer(args, **settings.allocation),
        callbacks=[AllocationCallback()],
    )


def adapted(source: str, settings: Settings) -> torch.nn.Module:
    """Put a LoRA adapter on every target of the pretrained model."""
    torch.manual_seed(settings.seed)
    model = load_causal_lm(source)
    config = LoRAConfig(
        rank=settings.rank,
        alpha=2 * settings.rank,
        targets=settings.targets or lora_targets(model),
    )
    return inject(model, config)


def last_checkpoint(output: Path, processes: int) -> Path | None:
    """Return the last checkpoint of so many processes that no kill has cut short."""
    folders = sorted(output.glob("checkpoint-[0-9]*"), key=step_of, reverse=True)
    return next((folder for folder in folders if is_whole(folder, processes)), None)


def step_of(checkpoint: Path) -> int:
    """Return the steps done when it was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_whole(checkpoint: Path, processes: int) -> bool:
    """Whether all is there: the Trainer's state comes last, but for other processes' files."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (OSError, ValueError):
        return False
    return len(list(checkpoint.glob("rng_state*.pth"))) == processes


def results(trainer: Any, start: int, seconds: float) -> dict[str, float]:
    """What a run of ``seconds`` from step ``start`` on was like, by flat keys."""
    model = trainer.model
    optimizer: DynamicAllocationOptimizer = trainer.optimizer.optimizer  # in Accelerate's
    after = trainer.evaluate()["eval_loss"]
    steps = trainer.state.global_step
    logs = trainer.state.log_history
    before = next(log["eval_loss"] for log in logs if "eval_loss" in log)
    found = {
        **loss_numbers(before, after),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "modules": len(optimizer.groups),
        "active_modules": sum(optimizer.record.counts().values()) / steps,
        "seconds_per_step": seconds / max(steps - start, 1),
        "processes": trainer.args.world_size,
    }
    peaks = [log["predicted_peak_bytes"] for log in logs if "predicted_peak_bytes" in log]
    if peaks:
        found["peak_bytes"] = max(peaks)
        found["peak_bytes_all_active"] = optimizer.memory_report().all_active.peak
    return found


def table(found: dict[str, float]) -> str:
    """Lay out the numbers, a line each."""
    rows = {
        **loss_cells(found),
        "trainable parameters": f"{found['trainable_parameters']:,}",
        "adapter modules": f"{found['modules']}",
        "active of them in the mean": f"{found['active_modules']:.1f}",
        "seconds per step": f"{found['seconds_per_step']:.3f}",
    }
    if "peak_bytes" in found:
        rows["peak memory of a step (MiB)"] = f"{found['peak_bytes'] / 2**20:.1f}"
        rows["with all active"] = f"{found['peak_bytes_all_active'] / 2**20:.1f}"
    return column(rows)


def parse(arguments: Sequence[str] | None) -> Settings:
    """Read the command line."""
    parser = text_parser((__doc__ or "").splitlines()[0], "runs/trainer", steps=40)
    add = parser.add_argument
    add("--targets", nargs="+", metavar="NAME", help="layers to adapt; None: by model type")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--rank", type=positive, default=8, help="of each adapter; alpha is twice as much")
    add("--active", type=share, default=2 / 3, help="active modules: 8, or a share: 0.5, 2/3")
    add("--period", type=positive, default=5, help="steps between two allocations")
    add("--memory", type=float, help="a Budget in place of --active: a share of LoRA's peak")
    add("--compute", type=float, help="as well, or alone: a share of LoRA's backward pass")
    return Settings(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune, print a table, and save the adapter."""
    settings = parse(arguments)
    try:
        work = TextWork.prepare(settings)
        model = adapted(work.source, settings)
        trainer = trainer_for(model, settings, work.train, work.held_out)
    except (OSError, ValueError) as error:
        sys.exit(f"trainer_finetune: {error}")

    processes = trainer.args.world_size
    checkpoint = last_checkpoint(settings.output, processes) if settings.save_every else None
    start = step_of(checkpoint) if checkpoint else 0
    done = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    found = results(trainer, start, done.metrics["train_runtime"])
    if trainer.is_world_process_zero():
        print(f"processes {processes}, from step {start}")
        print(table(found))
        save_adapter(model, settings.output / "adapter")
        write_json(
            settings.output / "summary.json",
            {**found, "settings": asdict(settings), "versions": versions()},
        )
        print(f"results in {settings.output}/")
    trainer.accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
