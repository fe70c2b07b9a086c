"""Pretrained classifiers and the places where adapters go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _assets import minilm_folder
from _hub import explained
from torch import nn

DEFAULT_MODEL = "all-MiniLM-L6-v2"

# The query and value projections, by transformers' ``config.model_type``. GPT-2 fuses them.
TARGETS = {
    "bert": ["query", "value"],
    "electra": ["query", "value"],
    "roberta": ["query", "value"],
    "xlm-roberta": ["query", "value"],
    "deberta-v2": ["query_proj", "value_proj"],
    "distilbert": ["q_lin", "v_lin"],
    "mpnet": ["q", "v"],
    "t5": ["q", "v"],
    "gemma": ["q_proj", "v_proj"],
    "llama": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "opt": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
}


def needs_hub(model: str) -> bool:
    """Whether ``model`` is a hub id: neither the default nor a local folder."""
    return model != DEFAULT_MODEL and not Path(model).is_dir()


def locate(model: str) -> str:
    """Return what ``from_pretrained`` takes: the default model's folder, or the name as it is."""
    return str(minilm_folder()) if model == DEFAULT_MODEL else model


def load_tokenizer(source: str) -> Any:
    """Load a tokenizer that can pad."""
    from transformers import AutoTokenizer

    with _explained(source):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:  # decoders have none
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(
    source: str, *, num_labels: int, pad_token_id: int, layers: int | None = None
) -> nn.Module:
    """Load the weights under a new classification head, drawn from torch's global generator.

    Args:
        source: A folder or a hub id.
        num_labels: Outputs of the head.
        pad_token_id: The tokenizer's; decoders look for it to find a row's last token.
        layers: Keep only the first so many transformer blocks.
    """
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()  # the head is new: we know
    logging.disable_progress_bar()
    cut = {} if layers is None else {"num_hidden_layers": layers}
    with _explained(source):
        model = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=num_labels,
            pad_token_id=pad_token_id,
            dtype=torch.float32,
            **cut,
        )
    assert isinstance(model, nn.Module)
    return model


def lora_targets(model: nn.Module) -> list[str]:
    """Return the names of the layers that get an adapter, by the model's type.

    Raises:
        ValueError: The type is not in `TARGETS`.
    """
    model_type = model.config.model_type  # type: ignore[union-attr]
    if model_type not in TARGETS:
        raise ValueError(
            f"no default LoRA targets for model type {model_type!r}; name them, such as "
            "--targets q_proj v_proj"
        )
    return TARGETS[str(model_type)]


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules beside the backbone that have weights: the head."""
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def _explained(source: str) -> Any:
    return explained(f"the model {source}", f"Without the hub: --model FOLDER or {DEFAULT_MODEL}.")
