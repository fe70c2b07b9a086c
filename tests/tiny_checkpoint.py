"""A tiny BERT and a few labelled sentences, as files that the examples take for real ones."""

from __future__ import annotations

from pathlib import Path

import torch

GOOD, BAD = ["fine", "great", "lovely", "warm"], ["dull", "poor", "flat", "cold"]


def write_checkpoint(folder: Path, *, layers: int = 2, dropout: float = 0.1) -> Path:
    """A Hugging Face folder: layers of width 16, a WordPiece vocabulary of a dozen words."""
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "was", *GOOD, *BAD]
    (folder / "vocab.txt").write_text("\n".join(words), "utf-8")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def write_texts(path: Path) -> Path:
    """A CSV of every ordered pair of words of one kind, labelled by the kind."""
    lines = [f"the film was {a} {b},{int(w is GOOD)}" for w in (GOOD, BAD) for a in w for b in w]
    path.write_text("\n".join(["text,label", *lines]), "utf-8")
    return path
