"""Full-parameter training of a causal language model by blocks, in a plain PyTorch loop.

    python examples/full_finetune.py                      # SmolLM2-135M on movie reviews, by BAdam
    python examples/full_finetune.py --method adamw       # all parameters in every step, to compare
    python examples/full_finetune.py --method budget --total 0.75GiB  # as many blocks as fit
    python examples/full_finetune.py --method lisa --layers 4 --pause drop
    python examples/full_finetune.py --dtype bfloat16 --rounding stochastic --fused-backward
    python examples/full_finetune.py --model my-folder --data my-text.txt --save-every 10

With --save-every, you can run the same command again after a kill: it continues from the last
checkpoint, bit for bit. The methods differ only in `optimizer_for`; the loop is in `train`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field
from itertools import islice
from typing import Any

import _checkpoint
import torch
from _assets import CAUSAL_LM
from _common import (
    DEVICE,
    Batch,
    Texts,
    linear_schedule,
    parser,
    placed,
    positive,
    table,
    training_batches,
)
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from dynalora_optim import (
    Backward,
    Blocks,
    DynamicAllocationOptimizer,
    StepMemory,
    badam,
    blocks_on_budget,
    lisa,
    measure_step,
)
from dynalora_optim.integrations.transformers import chunk_loss

BY_BLOCKS = {"outside", "pause", "checkpoint_idle", "fused_backward"}
TAKES = {  # method: its options; the comment says what trains in a step
    "adamw": set[str](),  # everything
    "badam": BY_BLOCKS | {"order"},  # one block at a time
    "lisa": BY_BLOCKS | {"layers"},  # random blocks, and what is outside the blocks
    "blocks": BY_BLOCKS | {"layers"},  # blocks chosen by importance
    "budget": {"pause", "total", "memory", "compute"},  # as many blocks as the memory holds
}
# The default learning rates.
RATES = {"adamw": 1e-4, "badam": 1e-3, "lisa": 3e-4, "blocks": 1e-3, "budget": 1e-3}


def optimizer_for(model: nn.Module, options: Namespace) -> Optimizer:
    """Return the method's optimizer over all parameters of ``model``.

    With bfloat16 weights AdamW gets float32 copies too; without them most updates would be lost.
    """
    lr = RATES[options.method] if options.lr is None else options.lr
    adamw = AdamW(model.parameters(), lr=lr)
    told: dict[str, Any] = {"period": options.period, "seed": options.seed, **given(options)}
    if "outside" in told:
        told["groups"] = Blocks(outside=told.pop("outside"))
    fused, recompute = told.pop("fused_backward", False), told.pop("checkpoint_idle", False)
    told["backward"] = Backward(fused=fused, checkpoint_idle=recompute)
    if options.dtype == "bfloat16":
        told["master_weights"] = options.rounding or "nearest"
    if options.method == "badam":
        return badam(model, adamw, **told)
    if options.method == "budget":
        chunk_loss(model)  # else the logits of the whole batch are the largest part of a step
        return blocks_on_budget(model, adamw, **told)
    if options.method == "lisa":
        return lisa(model, adamw, **told)
    if options.method == "blocks":
        told = {"active": told.pop("layers", 2), "groups": Blocks(outside="frozen"), **told}
        return DynamicAllocationOptimizer(adamw, model, **told)
    if options.dtype == "float32":
        return adamw
    return DynamicAllocationOptimizer(adamw, model, groups="blocks", active=1.0, **told)


def given(options: Namespace) -> dict[str, Any]:
    """Return the options for single methods that are given on the command line."""
    names = sorted(set().union(*TAKES.values()))
    return {name: value for name in names if (value := getattr(options, name)) is not None}


PROGRESS = ("loss_before", "losses", "trained", "memory", "seconds")  # saved in checkpoints


@dataclass
class Run:
    """What is trained, and what was measured in the steps so far."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    loss_before: float = 0.0  # on the held-out blocks
    losses: list[float] = field(default_factory=list)  # of the training steps
    trained: list[int] = field(default_factory=list)  # parameters that the step trains
    memory: list[tuple[int, ...]] = field(default_factory=list)  # StepMemory of one step per period
    seconds: list[float] = field(default_factory=list)  # of the other steps

    def loss(self, output: Any) -> Tensor:
        """Return the loss in the output of the model, and store its value."""
        loss: Tensor = output.loss
        self.losses.append(loss.item())
        return loss

    def trained_parameters(self) -> int:
        """Return how many parameters the next step trains."""
        if isinstance(self.optimizer, DynamicAllocationOptimizer):
            return sum(parameter.numel() for parameter in self.optimizer.active_parameters())
        return sum(parameter.numel() for parameter in self.model.parameters())


def prepare(texts: Texts, options: Namespace) -> Run:
    model = texts.model(getattr(torch, options.dtype)).to(DEVICE).train()
    optimizer = optimizer_for(model, options)
    if options.method == "budget":  # refused now if it is too small; all batches are as large
        rows = texts.train[: options.batch_size]
        optimizer.measure(**inputs(default_collate(rows)))  # type: ignore[attr-defined]
    torch.manual_seed(options.seed)  # for dropout, if the model has it
    return Run(model, optimizer, linear_schedule(optimizer, options.steps))


def train(run: Run, options: Namespace, batches: Iterator[Batch]) -> None:
    """Take the remaining steps in a plain loop. In some of them the memory is measured."""
    model, optimizer, start = run.model, run.optimizer, len(run.losses)
    left = islice(batches, start, None)  # the same batches as without interruption
    bar = tqdm(left, options.method, options.steps, initial=start, disable=None)
    for step, batch in enumerate(map(inputs, bar), start):
        run.trained.append(run.trained_parameters())
        if is_measured(step, options):
            run.memory.append(astuple(measure_step(model, batch, optimizer, loss=run.loss)))
        else:
            began = clock()
            run.loss(model(**batch)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            run.seconds.append(clock() - began)
        run.scheduler.step()
        bar.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)
        if options.save_every and (step + 1) % options.save_every == 0:
            save(run, options)


def inputs(batch: Batch) -> dict[str, Any]:
    """Return the arguments of the model; keys and values need not be kept for generation."""
    return {**placed(batch), "use_cache": False}


def is_measured(step: int, options: Namespace) -> bool:
    """Whether it is the second step of a period: its optimizer state exists already."""
    return bool(step % max(2, options.period) == 1)


def clock() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def held_out_loss(model: nn.Module, blocks: Sequence[Batch]) -> float:
    """Return the mean loss over the blocks, which all have the same length."""
    model.eval()
    alone = [{name: field[None] for name, field in block.items()} for block in blocks]
    losses = [float(model(**inputs(batch)).loss) for batch in alone]
    model.train()
    return statistics.fmean(losses)


def save(run: Run, options: Namespace) -> None:
    """Write a checkpoint."""
    _checkpoint.save(
        options,
        model=run.model.state_dict(),
        optimizer=run.optimizer.state_dict(),
        scheduler=run.scheduler.state_dict(),
        progress={name: getattr(run, name) for name in PROGRESS},
    )


def resume(run: Run, options: Namespace) -> None:
    """Load the checkpoint into ``run``, if there is one. Raise if its options are different."""
    state = _checkpoint.resume(options)
    if state is None:
        return
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    for name in PROGRESS:
        setattr(run, name, state["progress"][name])


def results(run: Run, after: float) -> dict[str, float]:
    """Return the results of the run, by name."""
    memory = StepMemory(*map(max, zip(*run.memory, strict=True)))
    return {
        "loss_before": run.loss_before,
        "loss_after": after,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "trained_parameters": statistics.fmean(run.trained),
        "seconds_per_step": statistics.median(run.seconds),
        **{f"{name}_bytes": size for name, size in asdict(memory).items()},
    }


def parse(arguments: Sequence[str] | None) -> Namespace:
    """Read the command line, or raise ValueError. None leaves an option to the method's default."""
    reader = parser(
        __doc__, model=CAUSAL_LM, steps=60, batch_size=4, length=64, period=2, output="runs/full"
    )
    add = reader.add_argument
    add("--method", choices=sorted(TAKES), default="badam", help="what trains in a step")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights")
    add("--rounding", choices=("nearest", "stochastic"), help="of bfloat16 weights at a pause")
    add("--layers", type=positive, help="active blocks, for lisa and blocks; None: 2")
    add("--order", choices=("ascending", "descending", "random"), help="order for badam")
    add("--outside", choices=("frozen", "always_active", "allocated"), help="embeddings, head")
    add("--pause", choices=("keep", "offload", "drop"), help="optimizer state at a pause")
    add("--checkpoint-idle", action="store_const", const=True, help="recompute inactive blocks")
    add("--total", help="memory for everything, for budget, such as 0.75GiB")
    add("--memory", type=float, help="in its place: a share of the step that trains all blocks")
    add("--compute", type=float, help="share of the backward pass of all blocks; None: 0.6")
    add("--fused-backward", action="store_const", const=True, help="update in the backward pass")
    add("--save-every", type=positive, help="steps between checkpoints; None: no checkpoints")
    options = reader.parse_args(arguments)
    for name, why in {
        "steps": "one step is timed, one measured",
        "length": "a token, and the next one to predict",
    }.items():
        if (value := getattr(options, name)) < 2:
            raise ValueError(f"--{name} {value} must be at least 2: {why}")
    if refused := sorted(given(options).keys() - TAKES[options.method]):
        raise ValueError(f"--method {options.method} takes no --{refused[0].replace('_', '-')}")
    if options.rounding is not None and options.dtype != "bfloat16":
        raise ValueError("--rounding needs bfloat16 weights: pass --dtype bfloat16 as well")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print a table, and save the model."""
    try:
        options = parse(arguments)
        texts = Texts.load(options)
        batches = training_batches(
            texts.train, batch_size=options.batch_size, steps=options.steps, seed=options.seed
        )
        run = prepare(texts, options)
        options.output.mkdir(parents=True, exist_ok=True)
        resume(run, options)
    except (OSError, ValueError) as error:
        sys.exit(f"full_finetune: {error}")

    start = len(run.losses)
    run.loss_before = run.loss_before or held_out_loss(run.model, texts.held_out)
    train(run, options, batches)
    found = results(run, held_out_loss(run.model, texts.held_out))
    print(f"{options.method} in {options.dtype} on {DEVICE}, from step {start}")
    print(table(found))
    summary = {**found, "training_loss": run.losses, "settings": vars(options)}
    (options.output / "summary.json").write_text(json.dumps(summary, default=str), "utf-8")
    if isinstance(run.optimizer, DynamicAllocationOptimizer):
        run.optimizer.record.to_json(options.output / "allocation.json")
        run.optimizer.record.plot(options.output / "allocation.png")
        run.optimizer.close()
    run.model.save_pretrained(options.output / "model")  # type: ignore[operator]
    texts.tokenizer.save_pretrained(options.output / "model")
    print(f"results in {options.output}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
