"""Tiny models whose blocks are of several kinds, or hold experts that the values choose among."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from listed_models import LANGUAGE, WIDTH, adapted
from tiny_models import TinyModel
from torch import Tensor, nn
from torch.nn import functional

ROWS, LENGTH, TOKENS = 4, 12, 96
TEXT = {**LANGUAGE, "num_hidden_layers": 4, "max_position_embeddings": 64}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}
LINEAR = r".*layers.*\.(q_proj|v_proj|in_proj|out_proj|o_proj)"


def tokens(rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, TOKENS, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def language_model(
    name: str, targets: str = LINEAR, *, config: str = "Config", **options: Any
) -> TinyModel:
    """A causal language model of transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}{config}")(**{**TEXT, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    spread_routers(model)
    return adapted(model, targets, tokens())


def spread_routers(model: nn.Module) -> None:
    """Let routers choose by their inputs: those of a new model choose almost alike."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name.endswith(("gate.weight", "router.weight")):
            nn.init.normal_(parameter)


def mixtral(experts: str) -> TinyModel:
    tiny = language_model("Mixtral", num_local_experts=4, **EXPERTS)
    tiny.model.set_experts_implementation(experts)
    return tiny


def qwen_moe(name: str) -> TinyModel:
    return language_model(
        name, num_experts=4, moe_intermediate_size=96, shared_expert_intermediate_size=48,
        decoder_sparse_step=2, head_dim=8, **EXPERTS,
    )  # fmt: skip


def gemma(name: str, **options: Any) -> TinyModel:
    kinds = ["sliding_attention", "full_attention"] * 2
    return language_model(
        name, config="TextConfig", layer_types=kinds, sliding_window=6, head_dim=8, **options
    )


def swin() -> TinyModel:
    """Lists of blocks within a list of stages, of which each is narrower in space and wider."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
        drop_path_rate=0.0, num_labels=3,
    )  # fmt: skip
    model = transformers.SwinForImageClassification(config)
    batch = {"pixel_values": torch.randn(ROWS, 3, 32, 32), "labels": torch.arange(ROWS) % 3}
    return adapted(model, r".*\.(query|q_proj|value|v_proj)", batch)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


class Mixture(nn.Module):
    """A block of experts in a list, each called with the tokens that have chosen it."""

    def __init__(self, experts: int, count: int) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        weights, chosen = (
            scores.topk(self.count, -1) if self.count > 1 else (scores, scores.argmax(-1, True))
        )
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            if len(rows):
                places = places if self.count > 1 else torch.full_like(places, number)
                made = expert(x[rows]) * weights[rows, places, None]
                y = y.index_add(0, rows, made.to(y.dtype))
        return x + y


class Mixtures(nn.Module):
    """A stem, blocks in pairs (a list of lists), and a loss."""

    def __init__(self, experts: int = 4, count: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Embedding(TOKENS, WIDTH)
        self.pairs = nn.ModuleList(
            nn.ModuleList(Mixture(experts, count) for _ in range(2)) for _ in range(2)
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.stem(input_ids.flatten())
        for pair in self.pairs:
            for block in pair:
                x = block(x)
        return x.square().mean()


def mixtures(count: int = 2) -> TinyModel:
    model = Mixtures(count=count)
    batch = {"input_ids": tokens(2 * ROWS)["input_ids"]}
    tiny = adapted(model, r".*\.(up|down)", batch)
    tiny.loss = lambda: model(**tiny.batch)  # type: ignore[method-assign]
    return tiny


def skip_unless_it_runs(tiny: TinyModel) -> None:
    """Skip a test whose model this torch cannot run."""
    try:
        tiny.loss()
    except NotImplementedError:
        pytest.skip("this torch has no products of grouped matrices on a CPU")


MIXED: dict[str, Callable[[], TinyModel]] = {
    "mixtral": lambda: mixtral("grouped_mm"),
    "mixtral_eager": lambda: mixtral("eager"),
    "qwen2_moe": lambda: qwen_moe("Qwen2Moe"),
    "qwen3_moe": lambda: qwen_moe("Qwen3Moe"),
    "mixtures": mixtures,
    "gemma3": lambda: gemma("Gemma3"),
    "swin": swin,
}
