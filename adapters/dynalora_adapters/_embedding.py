"""LoRA for embeddings: an embedding is a linear map of one-hot rows."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dynalora_adapters._bases import embed_scale
from dynalora_adapters._layers import LoRALinear


class LoRAEmbedding(LoRALinear):
    """An embedding with the weight W + scaling (B A)^T, (rows, dim), W frozen.

    A starts at zero and B at random, as in peft. If the base multiplies its rows by a factor, the
    delta is multiplied by it too. If an output head is tied to W, it stays without the delta.

    Args:
        base_layer: The embedding to adapt.
        rank: Rows of A and columns of B.
        alpha: Numerator of the scaling.
        dropout: Not used, as in peft.
        rslora: Scale by alpha / sqrt(rank) instead of alpha / rank.

    Attributes:
        lora_A: (rank, rows of the embedding), zero.
        lora_B: (dim, rank), drawn from a standard normal distribution.
    """

    peft_names: ClassVar[dict[str, str]] = {
        "lora_A": "lora_embedding_A",
        "lora_B": "lora_embedding_B",
    }

    lookup = True

    def draw(self) -> tuple[Tensor, Tensor]:
        """Return an A of zeros, and draw B. The generator is used exactly as peft uses it."""
        A = torch.randn(self.rank, self.in_features)
        B = torch.randn(self.out_features, self.rank)
        return A.zero_(), B.normal_()

    def delta(self, x: Tensor) -> Tensor:
        """Return scaling (B A)^T[x], (..., dim), for indices x, (...)."""
        A, B = self.adapter_param("lora_A"), self.adapter_param("lora_B")
        padding: int | None = self.base_layer.padding_idx  # type: ignore[assignment]
        rows = F.linear(F.embedding(x, A.t(), padding_idx=padding), B)
        return rows * self.scaling * embed_scale(self.base_layer)
