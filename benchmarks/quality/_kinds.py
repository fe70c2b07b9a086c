"""What the tasks ask of a model: a class or rating, the likeliest answer, or the next token.

A kind loads the model, tokenizes rows, and predicts. All of them return batches with ``labels`` and
``attention_mask``, and a model whose output has a ``loss``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from _models import load_classifier, load_language_model
from _shared import Batch, Row, encode
from _suite import SuiteTask
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

IGNORED = -100  # a label that takes no part in the loss
QUESTION = "\nQuestion: What is this text about?\nAnswer:"


class Kind(Protocol):
    """Loads a model for a task, tokenizes its rows, and predicts.

    ``mixed_precision`` is Accelerate's: "no", or "bf16"; then frozen weights are bfloat16, too.
    """

    mixed_precision: ClassVar[str]

    def load(self, source: str, *, layers: int | None) -> nn.Module:
        """Return the pretrained model."""
        ...

    def encode(self, rows: Sequence[Row], length: int) -> list[Batch]:
        """Return one example per row, of ``length`` tokens with padding."""
        ...

    def truth(self, example: Batch) -> float:
        """Return what is compared with the prediction of an example."""
        ...

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the predictions (rows,) and the loss of each row (rows,)."""
        ...


def kind_of(task: SuiteTask, tokenizer: Any) -> Kind:
    """Return the kind of a task, for a model with this tokenizer."""
    if task.asks == "next token":
        return NextToken(tokenizer)
    if task.asks == "answer":
        return Answer(task.answers, tokenizer)
    return Classifier(task.num_labels, task.is_regression, tokenizer)


@dataclass(frozen=True)
class Classifier:
    """An encoder with a new head predicts a class, or a rating."""

    mixed_precision: ClassVar[str] = "no"

    num_labels: int
    is_regression: bool
    tokenizer: Any

    def load(self, source: str, *, layers: int | None) -> nn.Module:
        pad = self.tokenizer.pad_token_id
        return load_classifier(source, num_labels=self.num_labels, pad_token_id=pad, layers=layers)

    def encode(self, rows: Sequence[Row], length: int) -> list[Batch]:
        return encode(self.tokenizer, rows, length)

    def truth(self, example: Batch) -> float:
        return float(example["labels"])

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        if self.is_regression:
            ratings = logits.squeeze(-1)
            return ratings, (ratings - labels) ** 2
        return logits.argmax(-1), cross_entropy(logits, labels, reduction="none")


@dataclass(frozen=True)
class NextToken:
    """A language model reads texts. The prediction of a row is its mean loss per token."""

    mixed_precision: ClassVar[str] = "bf16"

    tokenizer: Any

    def load(self, source: str, *, layers: int | None) -> nn.Module:
        return load_language_model(source, layers=layers)

    def encode(self, rows: Sequence[Row], length: int) -> list[Batch]:
        examples = encode(self.tokenizer, rows, length)
        for example in examples:
            padding = example["attention_mask"] == 0
            example["labels"] = example["input_ids"].masked_fill(padding, IGNORED)
        return examples

    def truth(self, example: Batch) -> float:
        return 0.0  # the loss of a perfect model

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        losses = _per_row(_logits(model, batch), batch["labels"])
        return losses, losses


@dataclass(frozen=True)
class Answer:
    """A language model is asked what a text is about. The prediction is the likeliest answer.

    The loss is of the answer alone. The answers begin with different tokens, and the likelihoods of
    these tokens are compared.

    Attributes:
        answers: The answer of each class.
        tokenizer: The tokenizer of the model.

    Raises:
        ValueError: Two answers begin with the same token.
    """

    mixed_precision: ClassVar[str] = "bf16"

    answers: tuple[str, ...]
    tokenizer: Any

    def __post_init__(self) -> None:
        if len(set(self.first.tolist())) < len(self.answers):
            raise ValueError(f"two of the answers {self.answers} begin with the same token")

    @property
    def first(self) -> Tensor:
        """The first token of each answer, (answers,)."""
        return torch.tensor([self._tokens(f" {answer}")[0] for answer in self.answers])

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def load(self, source: str, *, layers: int | None) -> nn.Module:
        return load_language_model(source, layers=layers)

    def encode(self, rows: Sequence[Row], length: int) -> list[Batch]:
        """Cut each text so that the question and the longest answer fit."""
        end = self.tokenizer.eos_token_id
        answers = [[*self._tokens(f" {answer}"), end] for answer in self.answers]
        question = self._tokens(QUESTION)
        room = length - len(question) - max(map(len, answers))
        prompts = ([*self._tokens(row.text)[:room], *question] for row in rows)
        return [
            self._example(prompt, answers[int(row.label)], row, length)
            for prompt, row in zip(prompts, rows, strict=True)
        ]

    def _example(self, prompt: list[int], answer: list[int], row: Row, length: int) -> Batch:
        padding = length - len(prompt) - len(answer)
        return {
            "input_ids": torch.tensor([*prompt, *answer, *[answer[-1]] * padding]),
            "attention_mask": torch.tensor([1] * (length - padding) + [0] * padding),
            "labels": torch.tensor([*[IGNORED] * len(prompt), *answer, *[IGNORED] * padding]),
            "answer": torch.tensor(int(row.label)),
        }

    def truth(self, example: Batch) -> float:
        return float(example["answer"])

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = _logits(model, batch)
        places = (batch["labels"] != IGNORED).int().argmax(1) - 1  # the last token of the prompt
        ahead = logits[torch.arange(len(logits)), places].float()
        return ahead[:, self.first.to(ahead.device)].argmax(-1), _per_row(logits, batch["labels"])


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits, without asking for the loss, (rows, tokens, vocabulary)."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output.logits  # type: ignore[no-any-return]


def _per_row(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss per token of each row, (rows,)."""
    ahead, wanted = logits[:, :-1].float(), labels[:, 1:]
    losses = cross_entropy(ahead.transpose(1, 2), wanted, reduction="none", ignore_index=IGNORED)
    return losses.sum(1) / (wanted != IGNORED).sum(1)
