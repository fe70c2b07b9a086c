"""Fine-tune a causal language model with transformers' Trainer and DynaLoRA, or on a budget.

    python examples/trainer_finetune.py                   # SmolLM2-135M on movie reviews
    python examples/trainer_finetune.py --memory 0.5 --compute 0.6
    python examples/trainer_finetune.py --model my-folder --data my-text.txt
    torchrun --nproc_per_node 2 examples/trainer_finetune.py --save-every 10

With --save-every, you can run the same command again after a kill: it continues from the last
checkpoint, bit for bit. Only the last two arguments in `trainer_for` are not plain Trainer code.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _assets import CAUSAL_LM
from _common import Texts, parser, positive, share, table

from dynalora_adapters import LoRAConfig, inject, save_adapter
from dynalora_optim import Budget, DynamicAllocationOptimizer


def allocation(options: Namespace) -> dict[str, Any]:
    """Return the options of DynamicAllocationOptimizer."""
    common = {"period": options.period, "seed": options.seed}
    if options.memory is None and options.compute is None:
        return {"active": options.active, **common}
    memory = 1.0 if options.memory is None else options.memory
    return {"allocator": Budget(memory, options.compute), **common}


def trainer_for(model: torch.nn.Module, texts: Texts, options: Namespace) -> Any:
    """Return a Trainer for the adapted ``model``."""
    # Imported here, because on import they read whether the hub may be used.
    from transformers import Trainer, TrainingArguments

    from dynalora_optim.integrations.transformers import AllocationCallback, dynalora_optimizer

    args = TrainingArguments(
        str(options.output),
        max_steps=options.steps,
        learning_rate=options.lr,
        warmup_steps=max(1, options.steps // 10),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        logging_steps=max(1, options.steps // 10),
        eval_on_start=True,  # with evaluate() before train(), the Trainer would not use DDP
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 1,
        save_total_limit=2,  # two, because a kill may damage the last one
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
    )
    return Trainer(
        model,
        args,
        train_dataset=texts.train,
        eval_dataset=texts.held_out,
        optimizer_cls_and_kwargs=dynalora_optimizer(args, **allocation(options)),
        callbacks=[AllocationCallback()],
    )


def adapted(texts: Texts, options: Namespace) -> torch.nn.Module:
    """Put a LoRA adapter on every target of the pretrained model."""
    torch.manual_seed(options.seed)
    config = LoRAConfig(rank=options.rank, alpha=2 * options.rank, targets=options.targets)
    return inject(texts.model(), config)


def last_checkpoint(output: Path, processes: int) -> Path | None:
    """Return the last checkpoint that is complete for this number of processes."""
    folders = sorted(output.glob("checkpoint-[0-9]*"), key=step_of, reverse=True)
    return next((folder for folder in folders if is_whole(folder, processes)), None)


def step_of(checkpoint: Path) -> int:
    """Return how many steps were done when it was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_whole(checkpoint: Path, processes: int) -> bool:
    """Whether it is complete: it has the Trainer's state and a file from each process."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (OSError, ValueError):
        return False
    return len(list(checkpoint.glob("rng_state*.pth"))) == processes


def results(trainer: Any, start: int, seconds: float) -> dict[str, float]:
    """Return the results of a run that began at step ``start`` and took ``seconds``."""
    model = trainer.model
    optimizer: DynamicAllocationOptimizer = trainer.optimizer.optimizer  # ours, inside Accelerate's
    after = trainer.evaluate()["eval_loss"]
    steps = trainer.state.global_step
    logs = trainer.state.log_history
    before = next(log["eval_loss"] for log in logs if "eval_loss" in log)
    found = {
        "loss_before": before,
        "loss_after": after,
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


def parse(arguments: Sequence[str] | None) -> Namespace:
    """Read the command line: the options of all examples, and those of this one."""
    reader = parser(
        __doc__,
        model=CAUSAL_LM,
        steps=40,
        batch_size=4,
        length=64,
        lr=1e-3,
        period=5,
        output="runs/trainer",
    )
    add = reader.add_argument
    add("--targets", nargs="+", default=["q_proj", "v_proj"], metavar="NAME", help="layers")
    add("--rank", type=positive, default=8, help="rank of each adapter; alpha is twice that")
    add("--active", type=share, default=2 / 3, help="active modules: a number or a share, 2/3")
    add("--memory", type=float, help="a Budget, in place of --active: share of LoRA's peak")
    add("--compute", type=float, help="a Budget too: share of LoRA's backward FLOPs")
    add("--save-every", type=positive, help="steps between checkpoints; None: no checkpoints")
    return reader.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune, print a table, and save the adapter."""
    options = parse(arguments)
    try:
        texts = Texts.load(options)
        model = adapted(texts, options)
        trainer = trainer_for(model, texts, options)
    except (OSError, ValueError) as error:
        sys.exit(f"trainer_finetune: {error}")

    processes = trainer.args.world_size
    checkpoint = last_checkpoint(options.output, processes) if options.save_every else None
    start = step_of(checkpoint) if checkpoint else 0
    done = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    found = results(trainer, start, done.metrics["train_runtime"])
    if trainer.is_world_process_zero():
        print(f"processes {processes}, from step {start}")
        print(table(found))
        save_adapter(model, options.output / "adapter")
        report = json.dumps({**found, "settings": vars(options)}, indent=2, default=str)
        (options.output / "summary.json").write_text(report, "utf-8")
        print(f"results in {options.output}/")
    trainer.accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
