"""The models of `full_parameter.py`: real weights on a CPU; known shapes on meta or a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _shapes import LARGE, smollm2
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class FullShape:
    """A model and its batch.

    Attributes:
        build: Returns the model, in training mode.
        rows: Sequences in the batch.
        length: Tokens in a sequence.
        timed_length: Tokens in a sequence when steps are timed.
        device: The device that it runs on.
    """

    name: str
    build: Callable[[], nn.Module]
    rows: int
    length: int
    timed_length: int
    device: str = "cpu"

    def model(self) -> Any:
        model: Any = self.build().train()
        model.config.use_cache = False  # training does not need keys and values
        return model

    def batch(self, model: Any, length: int | None = None) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        size = (self.rows, length or self.length)
        ids = torch.randint(5, model.config.vocab_size, size, generator=generator)
        return dict.fromkeys(("input_ids", "labels"), ids.to(self.device))


SMOLLM2 = FullShape("SmolLM2-135M", smollm2, rows=4, length=256, timed_length=64)
ON_CUDA = FullShape(
    "Llama-3.2-1B", LARGE[0].bare, rows=1, length=2048, timed_length=2048, device="cuda"
)


def _on_meta(config: LlamaConfig) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def _llama(name: str, **sizes: int) -> FullShape:
    config = LlamaConfig(
        vocab_size=128256, num_key_value_heads=8, tie_word_embeddings=False, **sizes
    )
    build = partial(_on_meta, config)
    return FullShape(name, build, rows=1, length=2048, timed_length=2048, device="meta")


PLANNED = (
    _llama(
        "Llama-3.1-8B",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    _llama(
        "Llama-3.1-70B",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
    ),
    _llama(
        "Llama-3.1-405B",
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
    ),
)


def _tiny() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    return model


QUICK = FullShape("a tiny Llama", _tiny, rows=2, length=16, timed_length=8)
