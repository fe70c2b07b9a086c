"""Texts with labels: where they come from, which are held out, and how they become batches."""

from __future__ import annotations

import csv
import hashlib
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _assets import rotten_tomatoes
from _hub import explained
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

Batch = dict[str, Tensor]

GLUE_COLUMNS = {
    "sst2": ["sentence"],
    "cola": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "stsb": ["sentence1", "sentence2"],
}
TASKS = ["rotten_tomatoes", *(name for name in GLUE_COLUMNS if name != "stsb")]  # with classes


class Row(NamedTuple):
    """One example: a text, or a pair of them, and its class, or its rating."""

    text: str
    label: int | float
    pair: str | None = None


@dataclass(frozen=True)
class Task:
    """Rows to train on and rows held out."""

    train: Sequence[Row]
    held_out: Sequence[Row]

    @property
    def num_labels(self) -> int:
        return 1 + max(int(row.label) for row in self.train)


def load_task(name: str, data: Path | None = None) -> Task:
    """Load ``data`` if it is given, else the task of this name, one of `TASKS`."""
    if data is not None:
        return Task(*split_tenth(read_csv(data)))
    if name == "rotten_tomatoes":
        return Task(*split_tenth([Row(text, label) for text, label in rotten_tomatoes()]))
    return load_glue(name)


def load_texts(path: Path | None = None) -> Task:
    """Load the lines of a file, or the movie reviews; a tenth is held out."""
    return load_task("rotten_tomatoes") if path is None else Task(*split_tenth(read_lines(path)))


def read_csv(path: Path) -> list[Row]:
    """Read the columns text and label; labels may be any words, numbered in sorted order.

    Raises:
        OSError: The file cannot be read.
        ValueError: It lacks a column, or holds fewer than two classes.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not {"text", "label"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} must have the columns text,label; it has {reader.fieldnames}")
        rows = [(row["text"], row["label"]) for row in reader]
    classes = sorted({label for _, label in rows})
    if len(classes) < 2:
        raise ValueError(f"{path} must hold at least two classes; it holds {classes}")
    return [Row(text, classes.index(label)) for text, label in rows]


def read_lines(path: Path) -> list[Row]:
    """Read a text from every line that is not blank; all are of one class.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds fewer than two texts.
    """
    lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    rows = [Row(line, 0) for line in lines if line]
    if len(rows) < 2:
        raise ValueError(f"{path} must hold two lines of text at least; it holds {len(rows)}")
    return rows


def load_glue(name: str) -> Task:
    """Load a GLUE task from the hub; its own validation split is held out."""
    from datasets import load_dataset

    def rows(split: Any) -> list[Row]:
        texts = [split[column] for column in GLUE_COLUMNS[name]]
        pairs = texts[1] if len(texts) == 2 else repeat(None)
        return [Row(*row) for row in zip(texts[0], split["label"], pairs, strict=False)]

    with explained(f"the GLUE task {name}", "Without the hub: --task rotten_tomatoes, --data CSV."):
        splits = load_dataset("nyu-mll/glue", name)
    return Task(rows(splits["train"]), rows(splits["validation"]))


def split_tenth(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Split off a tenth of each class, chosen by a hash of the text.

    The choice depends on nothing else: no seed, no generator, not the order of the rows.

    Returns:
        The rows to train on and the rows held out, each in their given order.

    Raises:
        ValueError: A class has a single row.
    """
    by_label: dict[float, list[int]] = defaultdict(list)
    for i in sorted(range(len(rows)), key=lambda i: hashlib.sha256(rows[i].text.encode()).digest()):
        by_label[rows[i].label].append(i)
    for label, members in by_label.items():
        if len(members) < 2:
            raise ValueError(f"class {label} has 1 row; it takes 2 to train on it and to hold out")
    held = {i for found in by_label.values() for i in found[: max(1, round(len(found) / 10))]}
    train = [row for i, row in enumerate(rows) if i not in held]
    return train, [rows[i] for i in sorted(held)]


def encode(
    tokenizer: Any, rows: Sequence[Row], max_length: int, device: str = "cpu"
) -> list[Batch]:
    """Tokenize to a fixed length, so that every batch costs the same.

    Returns:
        Per row, what the model takes: ``input_ids`` (max_length,) and so on, ``labels`` ().
    """
    pairs = [row.pair for row in rows] if rows[0].pair is not None else None
    fields = tokenizer(
        [row.text for row in rows],
        pairs,
        padding="max_length",
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
    )
    fields["labels"] = torch.tensor([row.label for row in rows])
    columns = [column.to(device) for column in fields.values()]
    return [dict(zip(fields, values, strict=True)) for values in zip(*columns, strict=True)]


def token_blocks(tokenizer: Any, rows: Sequence[Row], length: int) -> list[Batch]:
    """Join the texts, each with an end of text after it, and cut them into blocks without padding.

    Returns:
        Per block, what a causal LM takes: ``input_ids`` (length,) and the same as ``labels``.

    Raises:
        ValueError: The texts do not fill one block.
    """
    texts = tokenizer([row.text for row in rows], add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([token for text in texts for token in [*text, tokenizer.eos_token_id]])
    if len(tokens) < length:
        raise ValueError(f"{len(rows)} texts of {len(tokens)} tokens do not fill {length} tokens")
    whole = tokens[: len(tokens) // length * length].view(-1, length)
    return [{"input_ids": block, "labels": block.clone()} for block in whole]


def training_batches(
    examples: list[Batch], *, batch_size: int, steps: int, seed: int
) -> Iterator[Batch]:
    """Yield ``steps`` batches, reshuffled every epoch; the same seed gives the same order.

    Raises:
        ValueError: There are fewer examples than a batch holds.
    """
    if len(examples) < batch_size:
        raise ValueError(f"batch_size={batch_size} exceeds the {len(examples)} training rows")
    loader: DataLoader[Batch] = DataLoader(
        examples,  # type: ignore[arg-type]  # a list is a map-style dataset
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )
    return islice(chain.from_iterable(repeat(loader)), steps)


def length_grouped_batches(
    examples: list[Batch], *, batch_size: int, steps: int, seed: int
) -> Iterator[Batch]:
    """Yield ``steps`` batches of rows of similar length, which spares padding.

    Every epoch the rows are shuffled and cut into pools of 50 batches; the rows of a pool are
    sorted by length and its batches shuffled. The same seed gives the same order.

    Raises:
        ValueError: There are fewer examples than a batch holds.
    """
    if len(examples) < batch_size:
        raise ValueError(f"batch_size={batch_size} exceeds the {len(examples)} training rows")
    lengths = [int(example["attention_mask"].sum()) for example in examples]
    generator = random.Random(seed)

    def epoch() -> Iterator[list[int]]:
        order = generator.sample(range(len(examples)), len(examples))
        for start in range(0, len(order), 50 * batch_size):
            pool = sorted(order[start : start + 50 * batch_size], key=lengths.__getitem__)
            whole = range(0, len(pool) - batch_size + 1, batch_size)
            batches = [pool[first : first + batch_size] for first in whole]
            yield from generator.sample(batches, len(batches))

    rows = islice(chain.from_iterable(epoch() for _ in repeat(None)), steps)
    return (default_collate([examples[i] for i in batch]) for batch in rows)


def batched(examples: list[Batch], batch_size: int = 64) -> list[Batch]:
    """Stack the examples, shortest first, and cut the columns that are padding in a whole batch."""
    by_length = sorted(examples, key=lambda example: int(example["attention_mask"].sum()))
    batches: DataLoader[Batch] = DataLoader(by_length, batch_size=batch_size)  # type: ignore[arg-type]
    return [without_padding(batch) for batch in batches]


def without_padding(batch: Batch) -> Batch:
    """Cut the columns that are padding in every row."""
    kept = batch["attention_mask"].any(0)
    return {name: field[:, kept] if field.ndim == 2 else field for name, field in batch.items()}
