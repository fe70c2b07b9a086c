"""What the examples share: making batches from sentences, and parts of the training loops."""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _assets import CAUSAL_LM, CLASSIFIER, locate, movie_reviews
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Batch = dict[str, Tensor]


class Row(NamedTuple):
    """A text or a pair of texts, with its class or rating."""

    text: str
    label: int | float
    pair: str | None = None


@dataclass(frozen=True)
class Sentences:
    """Labelled sentences, tokenized for a pretrained classifier."""

    source: str  # the model, for from_pretrained
    pad_token_id: int
    num_labels: int
    train: list[Batch]
    held_out: list[Batch]

    @classmethod
    def load(cls, options: argparse.Namespace) -> Sentences:
        """Read and tokenize the data that --model, --data and --length select."""
        train, held_out = split_tenth(read_csv(options.data))
        source = locate(options.model)
        tokenizer = pretrained("AutoTokenizer", source)
        return cls(
            source,
            tokenizer.pad_token_id,
            1 + max(int(row.label) for row in train),
            encode(tokenizer, train, options.length),
            batched(encode(tokenizer, held_out, options.length)),
        )

    def classifier(self, seed: int, **options: Any) -> nn.Module:
        """Return the pretrained model with a new head; the same seed gives the same head."""
        torch.manual_seed(seed)
        options |= {"num_labels": self.num_labels, "pad_token_id": self.pad_token_id}
        kind = "AutoModelForSequenceClassification"
        model: nn.Module = pretrained(kind, self.source, dtype=torch.float32, **options)
        return model.to(DEVICE)


@dataclass(frozen=True)
class Texts:
    """Texts, tokenized for a pretrained causal language model and cut into blocks of tokens."""

    source: str  # the model, for from_pretrained
    tokenizer: Any
    train: list[Batch]
    held_out: list[Batch]

    @classmethod
    def load(cls, options: argparse.Namespace) -> Texts:
        """Read and tokenize the data as in `Sentences.load`. 32 blocks are held out."""
        train, held_out = split_tenth(read_lines(options.data))
        source = locate(options.model)
        tokenizer = pretrained("AutoTokenizer", source)
        blocks = [token_blocks(tokenizer, rows, options.length) for rows in (train, held_out)]
        return cls(source, tokenizer, blocks[0], blocks[1][:32])

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the pretrained model with weights in ``dtype``."""
        model: nn.Module = pretrained("AutoModelForCausalLM", self.source, dtype=dtype)
        return model


def pretrained(kind: str, source: str, **options: Any) -> Any:
    """Load ``source`` with a class of transformers, such as ``kind="AutoTokenizer"``."""
    import transformers

    transformers.logging.set_verbosity_error()  # we know that a classifier's head is new
    transformers.logging.disable_progress_bar()
    try:
        loaded = getattr(transformers, kind).from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise OSError(
            f"could not load the model {source}: {reason}. Without the hub, pass --model "
            f"FOLDER, {CLASSIFIER} or {CAUSAL_LM}."
        ) from error
    if kind == "AutoTokenizer" and loaded.pad_token is None:  # decoders have none
        loaded.pad_token = loaded.eos_token
    return loaded


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of the head: all modules with weights that are not the backbone."""
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def read_csv(path: Path | None) -> list[Row]:
    """Read the columns text and label; labels may be any words. None: the movie reviews.

    Raises:
        OSError: The file cannot be read.
        ValueError: A column is missing, or there are fewer than two classes.
    """
    if path is None:
        return [Row(text, label) for text, label in movie_reviews()]
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not {"text", "label"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} must have the columns text,label; it has {reader.fieldnames}")
        rows = [(row["text"], row["label"]) for row in reader]
    classes = sorted({label for _, label in rows})
    if len(classes) < 2:
        raise ValueError(f"{path} must have at least two classes; it has {classes}")
    return [Row(text, classes.index(label)) for text, label in rows]


def read_lines(path: Path | None) -> list[Row]:
    """Read one text per line that is not blank. None: the movie reviews.

    Raises:
        OSError: The file cannot be read.
        ValueError: There are fewer than two texts.
    """
    if path is None:
        return read_csv(None)
    lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    rows = [Row(line, 0) for line in lines if line]
    if len(rows) < 2:
        raise ValueError(f"{path} must have at least two lines of text; it has {len(rows)}")
    return rows


def split_tenth(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Split rows into those to train on and held-out ones: a tenth of each class, by text hash.

    Raises:
        ValueError: A class has only one row.
    """
    classes: dict[float, list[int]] = defaultdict(list)
    for i in sorted(range(len(rows)), key=lambda i: hashlib.sha256(rows[i].text.encode()).digest()):
        classes[rows[i].label].append(i)
    for label, members in classes.items():
        if len(members) < 2:
            raise ValueError(f"class {label} has 1 row; pass 2 or more: one of them is held out")
    held = {i for found in classes.values() for i in found[: max(1, round(len(found) / 10))]}
    train = [row for i, row in enumerate(rows) if i not in held]
    return train, [rows[i] for i in sorted(held)]


def encode(tokenizer: Any, rows: Sequence[Row], length: int) -> list[Batch]:
    """Tokenize each row to ``length`` tokens: ``input_ids`` (length,), ``labels`` (), ..."""
    pairs = [row.pair for row in rows] if rows[0].pair is not None else None
    shape = {"padding": "max_length", "truncation": True, "max_length": length}
    fields = tokenizer([row.text for row in rows], pairs, return_tensors="pt", **shape)
    fields["labels"] = torch.tensor([row.label for row in rows])
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]


def token_blocks(tokenizer: Any, rows: Sequence[Row], length: int) -> list[Batch]:
    """Join the texts, each followed by an end token; cut the result into ``length``-token blocks.

    Raises:
        ValueError: The texts do not fill one block.
    """
    texts = tokenizer([row.text for row in rows], add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([token for text in texts for token in [*text, tokenizer.eos_token_id]])
    if len(tokens) < length:
        raise ValueError(f"{len(rows)} texts with {len(tokens)} tokens do not fill {length} tokens")
    whole = tokens[: len(tokens) // length * length].view(-1, length)
    return [{"input_ids": block, "labels": block.clone()} for block in whole]


def training_batches(
    rows: list[Batch], *, batch_size: int, steps: int, seed: int
) -> Iterator[Batch]:
    """Yield ``steps`` batches, shuffled again in every epoch. Equal seeds give equal orders.

    Raises:
        ValueError: There are fewer rows than ``batch_size``.
    """
    if len(rows) < batch_size:
        raise ValueError(f"batch_size={batch_size} exceeds the {len(rows)} training rows")
    loader: DataLoader[Batch] = DataLoader(
        rows,  # type: ignore[arg-type]  # a list is a map-style dataset
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )
    return islice(chain.from_iterable(repeat(loader)), steps)


def batched(rows: list[Batch], batch_size: int = 64) -> list[Batch]:
    """Sort the rows by length and make batches; remove columns that are padding in every row."""
    by_length = sorted(rows, key=lambda row: int(row["attention_mask"].sum()))
    return [without_padding(batch) for batch in DataLoader(by_length, batch_size)]  # type: ignore[arg-type]


def without_padding(batch: Batch) -> Batch:
    """Remove the columns that are padding in every row."""
    kept = batch["attention_mask"].any(0)
    return {name: field[:, kept] if field.ndim == 2 else field for name, field in batch.items()}


def placed(batch: Batch, device: str | torch.device = DEVICE) -> Batch:
    """Return the batch on the device."""
    return {name: field.to(device) for name, field in batch.items()}


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the share of rows for which the largest logit is that of the label."""
    training = model.training
    model.eval()
    right = total = 0
    for batch in batches:
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        total += len(batch["labels"])
    model.train(training)
    return right / total


def linear_schedule(optimizer: Optimizer, steps: int, warm_up: float = 0.1) -> LambdaLR:
    """Return a schedule: the rate rises over the first tenth of the steps, then falls to 0."""
    rising = max(1, round(warm_up * steps))

    def factor(step: int) -> float:
        return (step + 1) / rising if step < rising else (steps - step) / max(1, steps - rising)

    return LambdaLR(optimizer, factor)


def table(found: Mapping[str, float]) -> str:
    """Return a table with one line per number; bytes are shown in MiB."""
    rows = []
    for name, value in found.items():
        shown = f"{value / 2**20 if name.endswith('_bytes') else value:,.3f}".removesuffix(".000")
        rows.append(f"{name.replace('_bytes', ' (MiB)').replace('_', ' '):<28}{shown:>16}")
    return "\n".join(rows)


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser for the options of all examples, with these defaults."""
    found = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = found.add_argument
    add("--model", help="hub id or local folder")
    add("--data", type=Path, metavar="FILE", help="your own texts; None: movie reviews")
    add("--steps", type=positive, help="optimizer steps")
    add("--batch-size", type=positive, help="rows in a batch")
    add("--length", type=positive, help="tokens in a row")
    add("--lr", type=float, help="peak learning rate")
    add("--period", type=positive, help="steps between two choices")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    add("--output", type=Path, help="folder for the results")
    found.set_defaults(**defaults)
    return found


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def share(text: str) -> float:
    """Read a count such as 8, or a share such as 0.5 or 2/3."""
    return int(text) if text.isdigit() else float(Fraction(text))
