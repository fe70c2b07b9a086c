"""Small models of the architectures that matter, each with a batch, built in milliseconds.

``build(name, seed)`` returns a ``TinyModel``: random weights, no dropout, and a batch that gives a
loss through ``model(**batch).loss``. Weights and batch depend on the seed only, and the global
generator is left as it was. transformers is imported when a model of its is built. ``ROOMY`` sizes
are for tests that count bytes: activations, not constants, are most of what they find.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH, ROWS, CLASSES, WIDTH, BLOCKS = 64, 7, 4, 3, 32, 2


@dataclass(frozen=True)
class Sizes:
    """How large a model and its batch are."""

    length: int = LENGTH
    rows: int = ROWS
    width: int = WIDTH
    blocks: int = BLOCKS
    dropout: float = 0.0


TINY = Sizes()
ROOMY = Sizes(length=32, width=64, blocks=4)


@dataclass
class TinyModel:
    """A model and what a test needs to adapt and train it.

    Attributes:
        name: The name it was built by.
        model: In training mode; nothing in it is random.
        batch: Keyword arguments of the model's forward, labels included.
        targets: Names of linear layers to adapt: two in each block (one where they are fused).
        trainable: Names of the classification head.
    """

    name: str
    model: nn.Module
    batch: dict[str, Tensor]
    targets: list[str]
    trainable: list[str]

    def loss(self) -> Tensor:
        """Return the loss of the batch, a scalar."""
        return self.model(**self.batch).loss

    def logits(self) -> Tensor:
        """Return the logits of the batch without a graph, in the model's present mode."""
        with torch.no_grad():
            return self.model(**self.batch).logits


class Output(NamedTuple):
    """What the plain-torch models return."""

    loss: Tensor | None
    logits: Tensor


class Stack(nn.Module):
    """Plain linear layers: rows of WIDTH numbers through BLOCKS residual blocks to a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(BLOCKS)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:
        """Map (rows, WIDTH) to logits (rows, CLASSES)."""
        for block in self.blocks:
            x = x + block(x)
        return _classify(self.head(x), labels)


class Encoder(nn.Module):
    """``nn.TransformerEncoder``, whose layers have an inference fast path, over embedded tokens."""

    def __init__(self, sizes: Sizes = TINY) -> None:
        super().__init__()
        width = sizes.width
        self.embed = nn.Embedding(VOCABULARY, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=sizes.dropout, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, sizes.blocks)
        for param in self.encoder.parameters():  # its layers are copies of one: make them differ
            nn.init.normal_(param, std=0.2)
        self.head = nn.Linear(width, CLASSES)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Output:
        """Map tokens (rows, length) to logits (rows, CLASSES) read off the first token."""
        padding = None if attention_mask is None else attention_mask == 0
        x = self.encoder(self.embed(input_ids), src_key_padding_mask=padding)
        return _classify(self.head(x[:, 0]), labels)


def build(name: str, seed: int = 0, sizes: Sizes = TINY) -> TinyModel:
    """Build the model called ``name``, one of ``NAMES`` or ``"mpnet"``, from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tiny = _BUILDERS[name](sizes)
    tiny.model.train()
    return tiny


def _classify(logits: Tensor, labels: Tensor | None) -> Output:
    return Output(None if labels is None else nn.functional.cross_entropy(logits, labels), logits)


def _tokens(sizes: Sizes) -> dict[str, Tensor]:
    """Token rows of which the last two are padded at the end."""
    mask = torch.ones(sizes.rows, sizes.length, dtype=torch.long)
    mask[-2:, -2:] = 0
    ids = torch.randint(2, VOCABULARY, (sizes.rows, sizes.length)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": _labels(sizes)}


def _labels(sizes: Sizes) -> Tensor:
    return torch.arange(sizes.rows) % CLASSES


def _bert(sizes: Sizes) -> TinyModel:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**_encoder_sizes(sizes)))
    return TinyModel("bert", model, _tokens(sizes), ["query", "value"], ["classifier"])


def _roberta(sizes: Sizes) -> TinyModel:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    model = RobertaForSequenceClassification(RobertaConfig(**_encoder_sizes(sizes), pad_token_id=0))
    return TinyModel("roberta", model, _tokens(sizes), ["query", "value"], ["classifier"])


def _mpnet(sizes: Sizes) -> TinyModel:
    from transformers import MPNetConfig, MPNetForSequenceClassification

    model = MPNetForSequenceClassification(MPNetConfig(**_encoder_sizes(sizes), pad_token_id=0))
    return TinyModel("mpnet", model, _tokens(sizes), ["q", "v"], ["classifier"])


def _encoder_sizes(sizes: Sizes) -> dict[str, float]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.blocks,
        "num_attention_heads": 4,
        "intermediate_size": 2 * sizes.width,
        "max_position_embeddings": 2 * sizes.length,
        "hidden_dropout_prob": sizes.dropout,
        "attention_probs_dropout_prob": sizes.dropout,
        "num_labels": CLASSES,
    }


def _gpt2(sizes: Sizes) -> TinyModel:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=sizes.length,
        n_embd=sizes.width,
        n_layer=sizes.blocks,
        n_head=4,
        resid_pdrop=sizes.dropout,
        embd_pdrop=sizes.dropout,
        attn_pdrop=sizes.dropout,
        num_labels=CLASSES,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = GPT2ForSequenceClassification(config)
    return TinyModel("gpt2", model, _tokens(sizes), ["c_attn"], ["score"])  # c_attn is a Conv1D


def _llama(sizes: Sizes) -> TinyModel:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.width,
        intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=4,
        num_key_value_heads=2,  # grouped queries: v_proj is not square
        max_position_embeddings=2 * sizes.length,
        num_labels=CLASSES,
        attention_dropout=sizes.dropout,
        pad_token_id=0,
    )
    model = LlamaForSequenceClassification(config)
    return TinyModel("llama", model, _tokens(sizes), ["q_proj", "v_proj"], ["score"])


def _vit(sizes: Sizes) -> TinyModel:
    from transformers import ViTConfig, ViTForImageClassification

    side = 8 * math.isqrt(sizes.length - 1)  # so many patches, and the class token
    config = ViTConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=4,
        intermediate_size=2 * sizes.width,
        image_size=side,
        patch_size=8,
        hidden_dropout_prob=sizes.dropout,
        attention_probs_dropout_prob=sizes.dropout,
        num_labels=CLASSES,
    )
    model = ViTForImageClassification(config)
    batch = {"pixel_values": torch.randn(sizes.rows, 3, side, side), "labels": _labels(sizes)}
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = ["q_proj", "v_proj"] if "q_proj" in names else ["query", "value"]  # transformers 5.0
    return TinyModel("vit", model, batch, targets, ["classifier"])


def _stack(sizes: Sizes) -> TinyModel:
    batch = {"x": torch.randn(sizes.rows, WIDTH), "labels": _labels(sizes)}
    return TinyModel("stack", Stack(), batch, ["0", "2"], ["head"])


def _encoder(sizes: Sizes) -> TinyModel:
    return TinyModel("encoder", Encoder(sizes), _tokens(sizes), ["linear1", "linear2"], ["head"])


_BUILDERS: dict[str, Callable[[Sizes], TinyModel]] = {
    "bert": _bert,
    "roberta": _roberta,
    "gpt2": _gpt2,
    "llama": _llama,
    "vit": _vit,
    "stack": _stack,
    "encoder": _encoder,
    "mpnet": _mpnet,
}
NAMES = tuple(name for name in _BUILDERS if name != "mpnet")  # to adapters, it is a roberta
TRANSFORMERS = NAMES[:5]


def randomize_trainable(model: nn.Module, seed: int = 1, scale: float = 0.1) -> None:
    """Move every trainable parameter by seeded noise, as training would: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                noise = torch.randn(param.shape, generator=generator)
                param.add_(noise.to(param.dtype), alpha=scale)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Return all that an operation on a model might change, to compare with ``same``."""
    modules = {name: id(m) for name, m in model.named_modules(remove_duplicate=False)}
    return {
        "modules": modules,
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "identity": {name: id(p) for name, p in model.named_parameters()},
        "attributes": {name: sorted(m.__dict__) for name, m in model.named_modules()},
    }


def same(before: dict[str, object], after: dict[str, object]) -> bool:
    """Whether two snapshots agree, tensors bit for bit."""
    old, new = before.pop("state"), after.pop("state")
    assert isinstance(old, dict)
    assert isinstance(new, dict)
    equal = old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    return equal and before == after
