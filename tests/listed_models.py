"""Tiny models with several lists of blocks: encoders with decoders, and towers that join."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import TinyModel
from torch import Tensor, nn
from torch.nn import functional

from dynalora_adapters import LoRAConfig, inject

ROWS, LENGTH, WIDTH = 8, 24, 32
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
VISION = {**TEXT, "image_size": 16, "patch_size": 4}
LANGUAGE = {
    **TEXT,
    "vocab_size": 128,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def adapted(
    model: nn.Module,
    targets: str | list[str],
    batch: dict[str, Tensor],
    trainable: list[str] | None = None,
) -> TinyModel:
    """``model`` in training mode with LoRA that has been trained a little."""
    config = LoRAConfig(rank=2, alpha=4, targets=targets, trainable=trainable or [])
    inject(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    model.train()
    return TinyModel(type(model).__name__, model, batch, [], [])


def ids(rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 60, (rows, length), generator=generator)


def t5() -> TinyModel:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=64, d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=3, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    return adapted(model, ["q", "v"], {"input_ids": ids(), "labels": ids(length=LENGTH // 2)})


def bart() -> TinyModel:
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=64, d_model=WIDTH, encoder_layers=2, decoder_layers=3, dropout=0.0,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH, max_position_embeddings=64, decoder_start_token_id=2,
        pad_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)
    return adapted(
        model, ["q_proj", "v_proj"], {"input_ids": ids(), "labels": ids(length=LENGTH // 2)}
    )


def whisper() -> TinyModel:
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=WIDTH, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH, max_source_positions=LENGTH, max_target_positions=32,
        dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    features = torch.randn(4, 8, 2 * LENGTH, generator=torch.Generator().manual_seed(0))
    batch = {"input_features": features, "labels": ids(4, 12)}
    return adapted(model, ["q_proj", "v_proj"], batch)


def pictures(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def llava(trainable: list[str] | None = None) -> TinyModel:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**LANGUAGE),
        image_token_id=127,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    tokens = ids()
    tokens[:, :16] = 127
    batch = {"input_ids": tokens, "labels": tokens, "pixel_values": pictures()}
    return adapted(model, r".*\.(q|v)_proj", batch, trainable)


def paligemma() -> TinyModel:
    transformers = pytest.importorskip("transformers")
    text = {**LANGUAGE, "head_dim": 8, "model_type": "gemma"}
    config = transformers.PaliGemmaConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=text,
        image_token_index=127,
        image_token_id=127,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    model = transformers.PaliGemmaForConditionalGeneration(config)
    tokens = ids()
    tokens[:, :16] = 127
    batch = {
        "input_ids": tokens,
        "labels": tokens,
        "pixel_values": pictures(),
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": (torch.arange(LENGTH) > 18).long().expand(ROWS, -1),
    }
    return adapted(model, r".*\.(q|v)_proj", batch)


def qwen2_vl() -> TinyModel:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2VLConfig(
        text_config={
            **LANGUAGE, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 3, "embed_dim": WIDTH, "num_heads": 4, "hidden_size": WIDTH, "patch_size": 4,
            "mlp_ratio": 2, "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=127, video_token_id=126, vision_start_token_id=125, vision_end_token_id=124,
    )  # fmt: skip
    model = transformers.Qwen2VLForConditionalGeneration(config)
    tokens = ids()
    tokens[:, 0], tokens[:, 1:5], tokens[:, 5] = 125, 127, 124
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": tokens,
        "labels": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == 127).long(),
        "pixel_values": torch.randn(ROWS * 16, 3 * 2 * 16, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS),
    }
    return adapted(model, r".*\.(qkv|proj|q_proj|v_proj)", batch)


def mllama() -> TinyModel:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    vision = MllamaVisionConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_global_layers=2, attention_heads=4,
        intermediate_size=2 * WIDTH, vision_output_dim=2 * WIDTH, image_size=16, patch_size=4,
        max_num_tiles=2, intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )  # fmt: skip
    text = MllamaTextConfig(**LANGUAGE, cross_attention_layers=[1])
    config = transformers.MllamaConfig(vision_config=vision, text_config=text)
    model = transformers.MllamaForConditionalGeneration(config)
    tokens = ids()
    batch = {
        "input_ids": tokens,
        "labels": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": pictures(2 * ROWS).view(ROWS, 1, 2, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(ROWS, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(ROWS, 1, 2, dtype=torch.long),
        "cross_attention_mask": torch.ones(ROWS, LENGTH, 1, 2, dtype=torch.long),
    }
    return adapted(model, r".*\.(q|v)_proj", batch)


def clip() -> TinyModel:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(
        text_config={**TEXT, "vocab_size": 64, "max_position_embeddings": 32, "eos_token_id": 2},
        vision_config={**VISION},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config)
    tokens = ids()
    tokens[:, -1] = 2
    batch = {"input_ids": tokens, "pixel_values": pictures(), "return_loss": True}
    trainable = ["visual_projection", "text_projection"]
    return adapted(model, ["q_proj", "v_proj"], batch, trainable)


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(x)))


class Tower(nn.Module):
    """A stem, blocks, and a head of its own."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Towers(nn.Module):
    """Two towers that join, or one on top of the other; they run in the reverse of definition."""

    def __init__(self, *, chained: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.second, self.first = Tower(3), Tower(2)
        self.between = nn.Linear(WIDTH, 8)
        self.chained = chained

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        a = self.first(x)
        b = self.second(self.between(functional.gelu(a)) + y if self.chained else y)
        return {"loss": (a * b).square().mean()}


def towers(*, chained: bool = False, trainable: list[str] | None = None) -> TinyModel:
    model = Towers(chained=chained)
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(64, 8, generator=generator) for name in ("x", "y")}
    tiny = adapted(model, r".*\.(up|down)", batch, trainable)
    tiny.loss = lambda: model(**tiny.batch)["loss"]  # type: ignore[method-assign]
    return tiny


LISTED: dict[str, Callable[[], Any]] = {
    "t5": t5,
    "bart": bart,
    "whisper": whisper,
    "llava": llava,
    "llava_projector": lambda: llava(["multi_modal_projector"]),
    "paligemma": paligemma,
    "qwen2_vl": qwen2_vl,
    "mllama": mllama,
    "clip": clip,
    "towers": towers,
    "towers_with_heads": lambda: towers(trainable=["out"]),
    "chained_towers": lambda: towers(chained=True),
    "chained_towers_that_train_between": lambda: towers(chained=True, trainable=["between"]),
}
