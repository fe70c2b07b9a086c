"""A short training loop with a real model and real sentences. DynaLoRA changes one line of it.

python examples/plain_loop.py
python examples/plain_loop.py --model my-folder --data my-texts.csv --output my-adapter
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from _assets import CLASSIFIER
from _common import Sentences, accuracy, parser, placed, training_batches

from dynalora_adapters import LoRAConfig, inject, save_adapter
from dynalora_optim import DynamicAllocationOptimizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print the held-out accuracy, and export the adapter."""
    options = parser(
        __doc__,
        model=CLASSIFIER,
        steps=150,
        batch_size=16,
        length=40,
        lr=2e-3,
        period=10,
        output=Path("runs/plain"),
    ).parse_args(arguments)
    try:
        sentences = Sentences.load(options)
        model = sentences.classifier(options.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"plain_loop: {error}")
    lora = LoRAConfig(rank=8, alpha=16, targets=["query", "value"], trainable=["classifier"])
    model = inject(model, lora)

    # The changed line. With AdamW alone this is plain LoRA.
    adamw = torch.optim.AdamW(model.parameters(), lr=options.lr)
    optimizer = DynamicAllocationOptimizer(adamw, model, active=2 / 3, period=options.period)

    model.train()
    batches = training_batches(
        sentences.train, batch_size=options.batch_size, steps=options.steps, seed=options.seed
    )
    for step, batch in enumerate(batches, start=1):
        loss = model(**placed(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step}: loss {loss.item():.3f}, active {len(optimizer.active_groups)}")

    print(f"held-out accuracy {accuracy(model, map(placed, sentences.held_out)):.3f}")
    save_adapter(model, options.output / "adapter")  # in peft's format
    print(f"adapter in {options.output}/adapter")
    return 0


if __name__ == "__main__":
    sys.exit(main())
