"""Fine-tune a chat model on conversations, with everything it takes within one number of bytes.

    python examples/sft.py                                # SmolLM2-135M-Instruct on movie reviews
    python examples/sft.py --data my-conversations.jsonl --total 2GiB --length 512
    python examples/sft.py --data HuggingFaceTB/smoltalk --subset all --steps 500
    python examples/sft.py --save-every 10                # run it again after a kill: it goes on

A line of a file is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}.
The loss is that of the answers alone. A row holds several conversations, and none of them attends
to another. With --save-every, a run that was killed continues bit for bit.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import _checkpoint
import torch
from _assets import CAUSAL_LM, locate
from _common import (
    DEVICE,
    Batch,
    linear_schedule,
    parser,
    placed,
    positive,
    pretrained,
    table,
    training_batches,
)
from _conversations import (
    IGNORED,
    Messages,
    as_row,
    check_boundaries,
    load_conversations,
    pack,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from dynalora_adapters import LoRAConfig, inject, save_adapter
from dynalora_optim import Budget, DynamicAllocationOptimizer

PROGRESS = ("before", "losses", "active", "peaks", "tokens", "seconds")  # saved in checkpoints


@dataclass(frozen=True)
class Data:
    """What is trained on, and what is held out."""

    train: list[Batch]
    held_out: list[Batch]
    sample: Messages  # a held-out conversation; its last answer is generated before and after


@dataclass
class Run:
    """What is trained, and what was seen in the steps so far."""

    model: Any
    tokenizer: Any
    optimizer: DynamicAllocationOptimizer
    scheduler: LambdaLR
    before: dict[str, Any] = field(default_factory=dict)  # what `evaluate` found
    losses: list[float] = field(default_factory=list)
    active: list[int] = field(default_factory=list)  # modules that the step trains
    peaks: list[int] = field(default_factory=list)  # bytes of everything in the step
    tokens: int = 0  # without padding
    seconds: float = 0.0


def prepare(options: Namespace) -> tuple[Run, Data]:
    """Load the model and the data; adapt the model, and build its optimizer."""
    from dynalora_optim.integrations.transformers import chunk_loss

    source = locate(options.model)
    tokenizer = pretrained("AutoTokenizer", source)
    train, held_out, too_long = load_conversations(
        tokenizer, options.data, subset=options.subset, rows=options.rows, length=options.length
    )
    rows = [
        pack(some, options.length) if options.packing else [[one] for one in some]
        for some in (train, held_out)
    ]
    model = pretrained("AutoModelForCausalLM", source, dtype=torch.float32).to(DEVICE)
    check_boundaries(model, rows[0])
    pad = tokenizer.pad_token_id
    batches = [[as_row(row, options.length, pad) for row in some] for some in rows]
    print(f"{len(train)} conversations in {len(rows[0])} rows, {too_long} left out: too long")

    torch.manual_seed(options.seed)
    inject(model, LoRAConfig(rank=options.rank, alpha=2 * options.rank, targets="all-linear"))
    chunk_loss(model)  # the logits of a whole batch would be the largest part of a step
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
    optimizer = DynamicAllocationOptimizer(
        adamw,
        model,
        allocator=Budget(total=options.total, compute=options.compute),
        period=options.period,
        seed=options.seed,
    )
    run = Run(model.train(), tokenizer, optimizer, linear_schedule(optimizer, options.steps))
    return run, Data(batches[0], batches[1][:16], held_out[0].messages)


def train(run: Run, options: Namespace, batches: Iterator[Batch]) -> None:
    """Take the remaining steps."""
    start = len(run.losses)
    left = islice(batches, start, None)  # the same batches as without interruption
    bar = tqdm(left, "sft", options.steps, initial=start, disable=None)
    for step, batch in enumerate(bar, start=start + 1):
        took, tokens = time.perf_counter(), int(batch.pop("tokens").sum())
        train_step(run, placed(batch))
        took = time.perf_counter() - took
        run.tokens, run.seconds = run.tokens + tokens, run.seconds + took
        bar.set_postfix(
            {
                "loss": f"{run.losses[-1]:.3f}",
                "tokens/s": f"{tokens / took:.0f}",
                "peak": f"{run.peaks[-1] / 2**20:.0f} MiB",
                "active": f"{run.active[-1]}/{len(run.optimizer.groups)}",
            },
            refresh=False,
        )
        if options.save_every and step % options.save_every == 0:
            save(run, options)


def train_step(run: Run, batch: Batch) -> None:
    """Train on a batch, as in any loop; the mean loss is over the tokens of the answers."""
    loss = run.model(**batch, use_cache=False).loss
    loss.backward()
    run.active.append(len(run.optimizer.active_groups))
    run.peaks.append(run.optimizer.memory_report().current.whole)
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    run.losses.append(loss.item())


@torch.no_grad()
def evaluate(run: Run, data: Data) -> dict[str, Any]:
    """Return the loss and the accuracy over the tokens of held-out answers, and a new answer."""
    run.model.eval()
    losses, right = [], []
    for row in data.held_out:  # one by one: here the logits of a whole row exist
        batch = placed({name: row[name][None] for name in ("input_ids", "position_ids")})
        targets = row["labels"][1:].to(DEVICE)
        answers = targets != IGNORED
        found = run.model(**batch, use_cache=False).logits[0, :-1][answers]
        losses += nn.functional.cross_entropy(found, targets[answers], reduction="none").tolist()
        right += (found.argmax(-1) == targets[answers]).tolist()
    said = answer(run, data.sample[:-1])
    run.model.train()
    return {"loss": statistics.fmean(losses), "accuracy": statistics.fmean(right), "says": said}


def answer(run: Run, messages: Messages) -> str:
    """Return what the model answers to ``messages``."""
    form = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    prompt = placed(run.tokenizer.apply_chat_template(messages, **form))
    limits = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": run.tokenizer.pad_token_id}
    output = run.model.generate(**prompt, **limits)[0, prompt["input_ids"].shape[1] :]
    return str(run.tokenizer.decode(output, skip_special_tokens=True)).strip()


def save(run: Run, options: Namespace) -> None:
    """Write a checkpoint; of the weights, only those of the adapters change."""
    weights = run.model.state_dict()
    _checkpoint.save(
        options,
        adapters={name: value for name, value in weights.items() if ".lora_" in name},
        optimizer=run.optimizer.state_dict(),
        scheduler=run.scheduler.state_dict(),
        progress={name: getattr(run, name) for name in PROGRESS},
    )


def resume(run: Run, options: Namespace) -> None:
    """Load the checkpoint into ``run``, if there is one. Raise if its options are different."""
    if (state := _checkpoint.resume(options)) is None:
        return
    run.model.load_state_dict(state["adapters"], strict=False)
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    for name in PROGRESS:
        setattr(run, name, state["progress"][name])


def results(run: Run, after: dict[str, Any]) -> dict[str, float]:
    """Return the results of the run, by name."""
    return {
        "loss_before": run.before["loss"],
        "loss_after": after["loss"],
        "token_accuracy_before": run.before["accuracy"],
        "token_accuracy_after": after["accuracy"],
        "tokens_per_second": run.tokens / run.seconds,
        "modules": len(run.optimizer.groups),
        "active_modules": statistics.fmean(run.active),
        "peak_bytes": max(run.peaks),
        "peak_all_active_bytes": run.optimizer.memory_report().all_active.whole,
    }


def parse(arguments: Sequence[str] | None) -> Namespace:
    """Read the command line: the options of all examples, and those of this one."""
    reader = parser(
        __doc__,
        model=CAUSAL_LM,
        steps=40,
        batch_size=2,
        length=256,
        lr=1e-3,
        period=5,
        output=Path("runs/sft"),
    )
    add = reader.add_argument
    add("--subset", help="part of a hub data set, if it has several")
    add("--rows", type=positive, default=4000, help="use this many conversations at most")
    add("--rank", type=positive, default=16, help="rank of each adapter; alpha is twice that")
    add("--total", type=amount, default="1GiB", help="bytes for everything, or, on a GPU, device")
    add("--compute", type=float, default=0.8, help="share of LoRA's backward FLOPs")
    add("--no-packing", dest="packing", action="store_false", help="a row for each conversation")
    add("--save-every", type=positive, help="steps between checkpoints; None: no checkpoints")
    return reader.parse_args(arguments)


def amount(text: str) -> int | str:
    """Read a number of bytes, or leave a text such as 2GiB to `Budget`."""
    return int(text) if text.isdigit() else text


def main(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune, print a table and an answer before and after, and save the adapter."""
    options = parse(arguments)
    try:
        run, data = prepare(options)
        batches = training_batches(
            data.train, batch_size=options.batch_size, steps=options.steps, seed=options.seed
        )
        options.output.mkdir(parents=True, exist_ok=True)
        resume(run, options)
        start = len(run.losses)
        run.before = run.before or evaluate(run, data)
        train(run, options, batches)  # a total that is too small is refused at the first batch
    except (OSError, ValueError) as error:
        sys.exit(f"sft: {error}")

    after = evaluate(run, data)
    found = results(run, after)
    print(f"on {DEVICE} within {options.total}, from step {start}")
    print(table(found))
    print(f"question: {data.sample[-2]['content']}")
    for name, said in {"before": run.before["says"], "after": after["says"]}.items():
        print(f"answer {name}: {said}")
    save_adapter(run.model, options.output / "adapter")  # in peft's format
    run.tokenizer.save_pretrained(options.output / "adapter")
    run.optimizer.record.to_json(options.output / "allocation.json")
    run.optimizer.close()
    summary = {**found, "before": run.before, "after": after, "settings": vars(options)}
    (options.output / "summary.json").write_text(json.dumps(summary, default=str), "utf-8")
    print(f"results in {options.output}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
