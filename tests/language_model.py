"""A language model whose every weight may train: embeddings that the head may share, and blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from toy import weights

VOCABULARY, LENGTH, WIDTH = 11, 5, 8


class Layer(nn.Module):
    """A residual block in which every token sees the mean of all."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(self.norm(x) + x.mean(1, keepdim=True)))
        return x + self.dropout(self.down(h))


class LanguageModel(nn.Module):
    """Token and position embeddings, ``layers`` blocks, a norm, and a head."""

    def __init__(
        self, layers: int = 4, *, tied: bool = True, dropout: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def tokens(step: int = 0, rows: int = 3) -> Tensor:
    """The batch of one step, the same in every run."""
    generator = torch.Generator().manual_seed(2000 + step)
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)


def backward(model: nn.Module, step: int = 0, rows: int = 3) -> Tensor:
    """One forward and backward pass on the next token; returns the loss."""
    batch = tokens(step, rows)
    logits = model(batch)[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits.float(), batch[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: Any, steps: int, start: int = 0) -> None:
    """A plain training loop; dropout depends on the step alone."""
    for step in range(start, start + steps):
        torch.manual_seed(step)
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """The parameters that differ from ``before``, by their first name."""
    return {name for name, new in weights(model).items() if not torch.equal(new, before[name])}


def of_layer(model: nn.Module, *positions: int) -> set[str]:
    """The names of all parameters of these layers."""
    return {
        name
        for name, _ in model.named_parameters()
        if any(name.startswith(f"layers.{i}.") for i in positions)
    }


OUTSIDE = {"position", "embed_tokens.weight", "norm.weight", "norm.bias"}  # tied weights once
