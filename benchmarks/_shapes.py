"""The models and batches that `memory.py` measures: known shapes, with random or real weights."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _assets import CAUSAL_LM, locate
from _common import pretrained


@dataclass(frozen=True, eq=False)  # hashable by identity: `targets` may be a list
class Shape:
    """A model, its batch, and the options of its LoRA.

    Attributes:
        model: Builds the model, without adapters, from a config. Its weights are random.
        config: Builds the config.
        weights: Loads the model with real weights instead, if given.
        rows: Sequences in the batch.
        length: Tokens in a sequence.
        rank: LoRA's rank; alpha is twice that.
        targets: The adapted layers.
        budgets: The budgets of our rows: shares of the memory and of the backward FLOPs.
        chunk: If not 0: the rows have their loss in chunks of so many tokens, and the budgets are
            shares of the peak of peft's LoRA.
        head: The module of which all parameters train, if any.
        device: The device that it runs on.
        dtype: The dtype of the weights.
        slack: A number that is added to every limit.
        draws: Number of choices to count for a row with a budget.
        control_draws: The same for the row with random frozen modules, where all choices differ.
    """

    name: str
    model: Callable[[Any], nn.Module]
    config: Callable[..., Any]
    rows: int
    length: int
    rank: int
    targets: list[str] | str
    budgets: tuple[tuple[float, float], ...]
    chunk: int = 0
    weights: Callable[[], nn.Module] | None = None
    head: str | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    slack: float = 0.0
    draws: int = 24
    control_draws: int = 12

    def bare(self) -> nn.Module:
        torch.manual_seed(0)
        with _default(self.dtype), torch.device(self.device):
            model: Any = self.weights() if self.weights else self.model(self.config())
        model.train().config.use_cache = False  # training does not need keys and values
        return model  # type: ignore[no-any-return]

    def batch(self, model: Any) -> dict[str, Tensor]:
        """Return random tokens without padding, and labels."""
        generator = torch.Generator().manual_seed(1)
        vocabulary = model.config.vocab_size
        ids = torch.randint(5, vocabulary, (self.rows, self.length), generator=generator)
        labels = torch.randint(2, (self.rows,), generator=generator) if self.head else ids
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


def copy_sharing(model: nn.Module, own: str | None) -> nn.Module:
    """Copy a model. The copy shares the frozen weights, except those of the part ``own``."""
    shared = {
        id(p): p for name, p in model.named_parameters() if not own or own not in name.split(".")
    }
    return copy.deepcopy(model, shared)


ROBERTA = Shape(
    "roberta",
    RobertaForSequenceClassification,
    partial(RobertaConfig, vocab_size=50265, num_labels=2, attn_implementation="eager"),
    rows=16,
    length=128,
    rank=8,
    targets=["query", "value"],
    budgets=(
        *((0.75, 1.0), (0.55, 1.0), (0.4, 1.0), (0.175, 1.0)),
        *((0.4, 0.6), (0.175, 0.6)),
    ),
    head="classifier",
)
LLAMA = Shape(
    "llama",
    LlamaForCausalLM,
    partial(
        LlamaConfig,
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        attn_implementation="eager",
    ),
    rows=4,
    length=512,
    rank=16,
    targets="all-linear",
    budgets=((0.75, 1.0), (0.4, 1.0), (0.175, 1.0), (0.135, 1.0), (0.4, 0.6)),
    slack=0.03,
    control_draws=4,  # with 112 modules the choices differ little
)


def smollm2() -> nn.Module:
    """Load SmolLM2-135M with its real weights, in float32."""
    model: nn.Module = pretrained("AutoModelForCausalLM", locate(CAUSAL_LM), dtype=torch.float32)
    return model


SMOLLM2 = Shape(
    "smollm2",
    LlamaForCausalLM,
    LlamaConfig,
    rows=4,
    length=256,
    rank=16,
    targets="all-linear",
    budgets=((0.4, 1.0), (0.4, 0.6), (0.15, 0.6), (0.07, 1.0), (0.065, 1.0)),
    chunk=128,
    weights=smollm2,
)
LLAMA_128K = replace(
    LLAMA,
    name="llama-128k",
    config=partial(LLAMA.config, vocab_size=128256),
    rows=1,
    budgets=((0.4, 1.0), (0.4, 0.6), (0.15, 0.6), (0.07, 1.0)),
    chunk=128,
)
ON_CPU = (ROBERTA, LLAMA, SMOLLM2, LLAMA_128K)


def _on_cuda(name: str, **sizes: Any) -> Shape:
    """Return a Llama 3 with these published sizes, 2,048 tokens, and fast attention."""
    config = partial(
        LlamaConfig,
        vocab_size=128256,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attn_implementation="sdpa",
        **sizes,
    )
    weights: Any = {"device": "cuda", "dtype": torch.bfloat16}
    return replace(LLAMA, name=name, config=config, rows=1, length=2048, **weights)


LARGE = (
    _on_cuda(
        "llama-3.2-1b",
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        tie_word_embeddings=True,
    ),
    _on_cuda(
        "llama-3.1-8b",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        tie_word_embeddings=False,
    ),
)


def quick(shape: Shape) -> Shape:
    """Return a small version of the shape, with which every row takes less than a second."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 4}
    if not shape.head:
        heads["num_key_value_heads"] = 2
    # The logits of a real vocabulary are larger than a block.
    vocabulary, chunk = (4096, 16) if shape.chunk else (100, 0)
    config = partial(shape.config, vocab_size=vocabulary, **sizes, **heads)
    small = replace(shape, config=config, weights=None, rows=4, length=32, rank=4, chunk=chunk)
    return replace(small, draws=3, control_draws=2)
