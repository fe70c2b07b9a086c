"""Conversations: read, written by a chat template, and packed into rows of tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _assets import movie_reviews
from _common import Batch, Row, placed, split_tenth
from torch import nn

ROLES = ("system", "user", "assistant")
IGNORED = -100  # the label of tokens that take no part in the loss
OPEN_ROWS = 32  # rows that can get another conversation while packing

Messages = list[dict[str, str]]


class Conversation(NamedTuple):
    """A conversation as text and as tokens."""

    messages: Messages
    text: str
    input_ids: list[int]
    labels: list[int]  # the tokens of the answers; IGNORED elsewhere


def load_conversations(
    tokenizer: Any, data: Path | None, *, subset: str | None, rows: int, length: int
) -> tuple[list[Conversation], list[Conversation], int]:
    """Return those to train on, the held-out ones, and how many are too long.

    Raises:
        OSError: The data cannot be read.
        ValueError: A conversation breaks a rule, the tokenizer has no chat template, or fewer than
            two conversations have at most ``length`` tokens.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the model's tokenizer has no chat template, so it is not a chat model; pass one with "
            "--model, such as an instruct model"
        )
    found = [written(tokenizer, *item) for item in islice(read(data, subset, rows), rows)]
    # By text: of equal conversations, none may be held out while another one trains.
    short = {one.text: one for one in found if len(one.input_ids) <= length}
    if len(short) < 2:
        raise ValueError(
            f"{data} has {len(found)} conversations, of which {len(short)} differ and have at most "
            f"{length} tokens; two are needed: pass more, or a larger --length"
        )
    train, held_out = split_tenth([Row(text, 0) for text in short])
    too_long = sum(len(one.input_ids) > length for one in found)
    return [short[row.text] for row in train], [short[row.text] for row in held_out], too_long


def read(data: Path | None, subset: str | None, rows: int) -> Iterator[tuple[str, Messages]]:
    """Yield the conversations of a file or a hub data set, each with its place."""
    if data is None:
        yield from about_reviews()
    elif data.is_file():
        yield from read_lines(data)
    elif data.suffix in (".jsonl", ".json"):
        raise FileNotFoundError(f"{data} does not exist; pass a file of JSON lines")
    else:
        import datasets

        datasets.disable_progress_bars()
        try:
            table = datasets.load_dataset(str(data), subset, split=f"train[:{rows}]")
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            hint = "pass the id of a data set on the hub, or a file of JSON lines"
            raise OSError(f"could not load the data set {data} ({reason}); {hint}") from error
        for number, row in enumerate(table, start=1):
            yield from checked(f"{data}, row {number}", row)


def read_lines(path: Path) -> Iterator[tuple[str, Messages]]:
    """Yield the conversations of a file with one JSON object in each line."""
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        place = f"{path}, line {number}"
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place} is not JSON ({error}); correct or remove it") from error
            yield from checked(place, value)


def about_reviews() -> Iterator[tuple[str, Messages]]:
    """Yield a question about each movie review, with its label as the answer."""
    reviews = movie_reviews()
    random.Random(0).shuffle(reviews)  # they are sorted by label
    for text, label in reviews:
        question = f"Is this movie review positive or negative?\n\n{text}"
        answer = "Positive." if label else "Negative."
        yield from checked(
            "reviews", {"messages": [said("user", question), said("assistant", answer)]}
        )


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def checked(place: str, value: Any) -> Iterator[tuple[str, Messages]]:
    """Yield the place and the messages of ``value``; raise if they break a rule."""
    if broken := broken_rule(value):
        raise ValueError(f"{place}: {broken}; correct or remove it")
    yield place, [said(message["role"], message["content"]) for message in value["messages"]]


def broken_rule(value: Any) -> str | None:
    """Return the rule that a row of data breaks, and the value found."""
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        form = '{"messages": [{"role": "user", "content": "..."}, ...]}'
        return f"it must have the form {form}, and is {str(value)[:80]!r}"
    for number, message in enumerate(messages, start=1):
        fields = message if isinstance(message, dict) else {}
        if (role := fields.get("role")) not in ROLES:
            return (
                f"the role of message {number} must be one of {', '.join(ROLES)}, and is {role!r}"
            )
        if not isinstance(content := fields.get("content"), str):
            return f"the content of message {number} must be a text, and is {content!r}"
        if role == "assistant" and not content.strip():
            return f"message {number}, an answer of the assistant, is empty"
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant" or "user" not in roles[: roles.index("assistant")]:
        return f"a user must ask first and the assistant answer last, and the roles are {roles}"
    return None


def written(tokenizer: Any, place: str, messages: Messages) -> Conversation:
    """Write the messages with the chat template. The labels are the answers, with their end.

    Raises:
        ValueError: The template does not fit the messages: it refuses them, or writes one in
            another way once others follow, so that the place of an answer cannot be found.
    """
    from jinja2 import TemplateError

    def text_of(count: int, **options: bool) -> str:
        options["tokenize"] = False
        text: str = tokenizer.apply_chat_template(messages[:count], **options)
        return text

    try:
        text = text_of(len(messages))
        spans = list(answers_in(text, messages, text_of))
    except (TemplateError, LookupError) as error:
        raise ValueError(
            f"{place}: the chat template does not fit this conversation ({error}); correct or "
            "remove it, or keep only its last answer"
        ) from error
    fields = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(first < end and begin < last for first, last in spans) else IGNORED
        for token, (begin, end) in zip(fields["input_ids"], fields["offset_mapping"], strict=True)
    ]
    return Conversation(messages, text, fields["input_ids"], labels)


def answers_in(
    text: str, messages: Messages, text_of: Callable[..., str]
) -> Iterator[tuple[int, int]]:
    """Yield where the answers begin and end in ``text``, which has all ``messages``."""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, through = text_of(i, add_generation_prompt=True), text_of(i + 1).rstrip()
            if not (through.startswith(before) and text.startswith(through)):
                raise LookupError(f"it writes message {i + 1} in another way when more follow")
            yield len(before), len(through)


def pack(conversations: Iterable[Conversation], length: int) -> list[list[Conversation]]:
    """Divide conversations into rows of at most ``length`` tokens: into the first with room."""
    rows: list[list[Conversation]] = []
    room: list[int] = []
    for one in conversations:
        size = len(one.input_ids)
        recent = range(max(0, len(rows) - OPEN_ROWS), len(rows))
        place = next((i for i in recent if room[i] >= size), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(length)
        rows[place].append(one)
        room[place] -= size
    return rows


def as_row(conversations: Sequence[Conversation], length: int, pad: int) -> Batch:
    """Return conversations one after the other: ``input_ids``, ``labels``, ... (length,).

    ``position_ids`` begin anew with each one. This is how transformers sees where one ends, and
    lets none attend to another, if it gets no attention mask.
    """
    from transformers import DataCollatorWithFlattening

    fields = [{"input_ids": one.input_ids, "labels": one.labels} for one in conversations]
    flat = DataCollatorWithFlattening()(fields)  # (1, tokens) each
    tokens = flat["input_ids"].shape[1]
    row = {}
    for name, filler in {"input_ids": pad, "labels": IGNORED, "position_ids": 0}.items():
        row[name] = nn.functional.pad(flat[name][0], (0, length - tokens), value=filler)
    return {**row, "tokens": torch.tensor(tokens)}


@torch.no_grad()
def check_boundaries(model: nn.Module, rows: Sequence[Sequence[Conversation]]) -> None:
    """Compare the logits of a conversation in a row with those of it alone.

    Raises:
        ValueError: They differ: the model's attention goes across the boundaries in a row.
    """
    shared = next((row[:2] for row in rows if len(row) > 1), None)
    if shared is None:
        return
    size = len(shared[1].input_ids)
    packed, alone = (logits(model, row)[-size:] for row in (shared, shared[1:]))
    if not torch.allclose(packed, alone, rtol=0, atol=1e-3 * float(alone.abs().max())):
        raise ValueError(
            f"{type(model).__name__} lets conversations in one row attend to each other: its "
            "attention does not see that position_ids begin anew; pass --no-packing"
        )


def logits(model: nn.Module, row: Sequence[Conversation]) -> torch.Tensor:
    """Return the logits of conversations in one row without padding: (tokens, vocabulary)."""
    length = sum(len(one.input_ids) for one in row)
    batch = placed({name: field[None] for name, field in as_row(row, length, 0).items()})
    training = model.training
    model.eval()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    found: torch.Tensor = model(**inputs, use_cache=False).logits[0]
    model.train(training)
    return found
