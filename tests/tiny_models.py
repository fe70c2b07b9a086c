"""Small models of the architectures that matter, each with a batch, built in milliseconds.

``build(name, seed)`` returns a ``TinyModel``: random weights, no dropout, and a batch that gives a
loss through ``model(**batch).loss``. Weights and batch depend on the seed only, and the global
generator is left as it was. transformers is imported when a model of its is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH, ROWS, CLASSES, WIDTH, BLOCKS = 64, 7, 4, 3, 32, 2


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

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, BLOCKS)
        for param in self.encoder.parameters():  # its layers are copies of one: make them differ
            nn.init.normal_(param, std=0.2)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Output:
        """Map tokens (rows, length) to logits (rows, CLASSES) read off the first token."""
        padding = None if attention_mask is None else attention_mask == 0
        x = self.encoder(self.embed(input_ids), src_key_padding_mask=padding)
        return _classify(self.head(x[:, 0]), labels)


def build(name: str, seed: int = 0) -> TinyModel:
    """Build the model called ``name``, one of ``NAMES``, from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tiny = _BUILDERS[name]()
    tiny.model.train()
    return tiny


def _classify(logits: Tensor, labels: Tensor | None) -> Output:
    return Output(None if labels is None else nn.functional.cross_entropy(logits, labels), logits)


def _tokens() -> dict[str, Tensor]:
    """Token rows of which the last two are padded at the end."""
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[-2:, -2:] = 0
    ids = torch.randint(2, VOCABULARY, (ROWS, LENGTH)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": _labels()}


def _labels() -> Tensor:
    return torch.arange(ROWS) % CLASSES


def _bert() -> TinyModel:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**_encoder_sizes()))
    return TinyModel("bert", model, _tokens(), ["query", "value"], ["classifier"])


def _roberta() -> TinyModel:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    model = RobertaForSequenceClassification(RobertaConfig(**_encoder_sizes(), pad_token_id=0))
    return TinyModel("roberta", model, _tokens(), ["query", "value"], ["classifier"])


def _encoder_sizes() -> dict[str, float]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": 2 * LENGTH,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": CLASSES,
    }


def _gpt2() -> TinyModel:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=BLOCKS,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        num_labels=CLASSES,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = GPT2ForSequenceClassification(config)
    return TinyModel("gpt2", model, _tokens(), ["c_attn"], ["score"])  # c_attn is a Conv1D


def _llama() -> TinyModel:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,  # grouped queries: v_proj is not square
        max_position_embeddings=2 * LENGTH,
        num_labels=CLASSES,
        pad_token_id=0,
    )
    model = LlamaForSequenceClassification(config)
    return TinyModel("llama", model, _tokens(), ["q_proj", "v_proj"], ["score"])


def _vit() -> TinyModel:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    model = ViTForImageClassification(config)
    batch = {"pixel_values": torch.randn(ROWS, 3, 16, 16), "labels": _labels()}
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = ["q_proj", "v_proj"] if "q_proj" in names else ["query", "value"]  # transformers 5.0
    return TinyModel("vit", model, batch, targets, ["classifier"])


def _stack() -> TinyModel:
    batch = {"x": torch.randn(ROWS, WIDTH), "labels": _labels()}
    return TinyModel("stack", Stack(), batch, ["0", "2"], ["head"])


def _encoder() -> TinyModel:
    return TinyModel("encoder", Encoder(), _tokens(), ["linear1", "linear2"], ["head"])


_BUILDERS: dict[str, Callable[[], TinyModel]] = {
    "bert": _bert,
    "roberta": _roberta,
    "gpt2": _gpt2,
    "llama": _llama,
    "vit": _vit,
    "stack": _stack,
    "encoder": _encoder,
}
NAMES = tuple(_BUILDERS)
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
