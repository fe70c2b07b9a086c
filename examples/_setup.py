"""The command line, and what it asks for: the data, the tokenizer, the pretrained model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from _data import (
    GLUE_COLUMNS,
    TASKS,
    Batch,
    batched,
    encode,
    load_task,
    load_texts,
    token_blocks,
    training_batches,
)
from _hub import go_offline_unless_reachable
from _models import (
    DEFAULT_CAUSAL_LM,
    DEFAULT_MODEL,
    load_classifier,
    load_tokenizer,
    locate,
    needs_hub,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HELD_OUT = 32  # blocks of text that a language model's loss is taken on


@dataclass(frozen=True)
class Settings:
    """The command line."""

    model: str
    task: str
    data: Path | None
    targets: list[str] | None
    layers: int | None
    steps: int
    batch_size: int
    max_length: int
    lr: float
    rank: int
    active: float
    period: int
    memory: float
    compute: float
    seed: int
    output: Path


@dataclass(frozen=True)
class Work:
    """Everything that both runs share."""

    settings: Settings
    source: str  # what from_pretrained takes
    num_labels: int
    pad_token_id: int
    examples: list[Batch]
    held_out: list[Batch]
    device: str

    @classmethod
    def prepare(cls, settings: Settings, device: str = DEVICE) -> Work:
        """Load what the settings name.

        Raises:
            OSError: It cannot be had: no network, no such file.
            ValueError: It is not what it should be.
        """
        if (settings.data is None and settings.task in GLUE_COLUMNS) or needs_hub(settings.model):
            go_offline_unless_reachable()
        task = load_task(settings.task, settings.data)
        source = locate(settings.model)
        tokenizer = load_tokenizer(source)
        return cls(
            settings,
            source,
            task.num_labels,
            tokenizer.pad_token_id,
            encode(tokenizer, task.train, settings.max_length, device),
            batched(encode(tokenizer, task.held_out, settings.max_length, device)),
            device,
        )

    def batches(self) -> Iterator[Batch]:
        """The training batches, in the same order at every call."""
        s = self.settings
        return training_batches(self.examples, batch_size=s.batch_size, steps=s.steps, seed=s.seed)

    def classifier(self) -> torch.nn.Module:
        """The pretrained model under a new head: the same one at every call."""
        torch.manual_seed(self.settings.seed)
        model = load_classifier(
            self.source,
            num_labels=self.num_labels,
            pad_token_id=self.pad_token_id,
            layers=self.settings.layers,
        )
        return model.to(self.device)


def parse(arguments: Sequence[str] | None, *, description: str, output: str) -> Settings:
    """Read the command line."""
    return Settings(**vars(parser(description, output).parse_args(arguments)))


def parser(description: str, output: str) -> argparse.ArgumentParser:
    """Return what reads the `Settings`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="hub id or local folder")
    add("--task", default=TASKS[0], choices=TASKS, help="data set; all but the first from the hub")
    add("--data", type=Path, metavar="CSV", help="in place of --task: columns text,label")
    add("--targets", nargs="+", metavar="NAME", help="layers to adapt; None: by model type")
    add("--layers", type=positive, help="keep the first so many blocks only, for a quick look")
    add("--steps", type=positive, default=300, help="optimizer steps of each run")
    add("--batch-size", type=positive, default=16, help="rows a step")
    add("--max-length", type=positive, default=48, help="tokens a row")
    add("--lr", type=float, default=4e-3, help="peak learning rate")
    add("--rank", type=positive, default=8, help="of each adapter; alpha is twice as much")
    add("--active", type=share, default=2 / 3, help="active modules: 8, or a share: 0.5, 2/3")
    add("--period", type=positive, default=20, help="steps between two allocations")
    add("--memory", type=float, default=0.40, help="the Budget's share of LoRA's peak")
    add("--compute", type=float, default=0.6, help="the Budget's share of LoRA's backward pass")
    add("--seed", type=int, default=0, help="of the head, the order, the dropout, the allocation")
    add("--output", type=Path, default=Path(output), help="folder for the results")
    return parser


@dataclass(frozen=True)
class TextSettings:
    """The command line of the scripts that train a causal language model; see `text_parser`."""

    model: str
    data: Path | None
    steps: int
    batch_size: int
    length: int
    save_every: int | None
    seed: int
    output: Path


@dataclass(frozen=True)
class TextWork:
    """What a causal language model trains on, and is measured on, as blocks of tokens."""

    source: str  # what from_pretrained takes
    tokenizer: Any
    train: list[Batch]
    held_out: list[Batch]

    @classmethod
    def prepare(cls, settings: TextSettings) -> TextWork:
        """Load what the settings name.

        Raises:
            OSError: It cannot be had: no network, no such file.
            ValueError: It is not what it should be.
        """
        if needs_hub(settings.model):
            go_offline_unless_reachable()
        source = locate(settings.model)
        tokenizer = load_tokenizer(source)
        task = load_texts(settings.data)
        train = token_blocks(tokenizer, task.train, settings.length)
        held_out = token_blocks(tokenizer, task.held_out, settings.length)[:HELD_OUT]
        return cls(source, tokenizer, train, held_out)


def text_parser(description: str, output: str, *, steps: int) -> argparse.ArgumentParser:
    """Return what reads the `TextSettings`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=DEFAULT_CAUSAL_LM, help="hub id or local folder")
    add("--data", type=Path, metavar="TXT", help="a text a line; None: movie reviews")
    add("--steps", type=positive, default=steps, help="optimizer steps")
    add("--batch-size", type=positive, default=4, help="blocks of text a step")
    add("--length", type=positive, default=64, help="tokens a block")
    add("--save-every", type=positive, help="steps; go on from the last checkpoint. None: neither")
    add("--seed", type=int, default=0, help="of all that is drawn")
    add("--output", type=Path, default=Path(output), help="folder for the results")
    return parser


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def share(text: str) -> float:
    """Read a count such as 8, or a share such as 0.5 or 2/3."""
    return int(text) if text.isdigit() else float(Fraction(text))
