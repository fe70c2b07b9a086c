"""Tiny causal language models of every kind that transformers has and that need no extra package.

RecurrentGemma is missing: see ``docs/budgets.md``. So are models whose class or configuration
cannot be made this small.
"""

from __future__ import annotations

from typing import Any

import torch
from mixed_models import language_model
from tiny_models import TinyModel
from torch import nn

_NAMES = (
    "NanoChat Apertus Arcee BitNet Bloom Cohere Cohere2 Cwm Doge Electra Ernie4_5 Ernie4_5_Moe "
    "Exaone4 Falcon FalconH1 FalconMamba FlexOlmo GPTBigCode GPTNeoX Gemma Gemma2 Gemma3 Glm Glm4 "
    "Glm4Moe GptOss Granite GraniteMoe GraniteMoeShared HunYuanDenseV1 HunYuanMoEV1 Jais2 Lfm2 "
    "Llama4 MiniMax Ministral Mistral Mixtral ModernBertDecoder Mpt Nemotron OPT Olmo Olmo2 Olmo3 "
    "Olmoe Persimmon Phi Phi3 Phimoe Qwen2 Qwen3 Qwen3Moe Qwen3Next Roberta SeedOss SmolLM3 "
    "StableLm Starcoder2 VaultGemma XGLM"
)
_TARGETS = (
    r".*\.(q_proj|v_proj|in_proj|out_proj|o_proj|query_key_value|Wqkv|c_attn|qkv_proj|query|value|"
    r"dense|fc1|fc2|q_b_proj|kv_b_proj|qkv|up_proj|x_proj|dt_proj|gate_proj|down_proj)"
)
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
_SMALL = {**_EXPERTS, "d_state": 8, "mamba_d_state": 8, "head_dim": 16}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
_GPT = {"rotary_dim": 8, "n_embd": 32, "n_head": 4, "n_layer": 4}
_DEEPSEEK = {
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
_EVERY_SECOND = {"attn_layer_period": 2, "attn_layer_offset": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {} for name in _NAMES.split()},
    "Bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "CodeGen": _GPT,
    "DeepseekV2": _DEEPSEEK,
    "DeepseekV3": _DEEPSEEK,
    "Dots1": {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "GPTJ": _GPT,
    "GPTNeo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "Gemma3": {"config": "TextConfig"},
    "Gemma3n": {
        "config": "TextConfig",
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": 64,
    },
    "GraniteMoeHybrid": {
        **_MAMBA,
        "layer_types": ["mamba", "attention"] * 2,
        "shared_intermediate_size": 64,
    },
    "Helium": {"head_dim": 8},
    "Jamba": {
        **_EVERY_SECOND,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
    },
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "Llama4": {"config": "TextConfig"},
    "Mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "Zamba": {**_EVERY_SECOND, "num_hidden_layers": 6, "n_mamba_heads": 2},
    "Zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
    },
}
# Their heads have the width of the model, divided by their number.
_NO_HEAD_DIM = {"BitNet", "Falcon", "ModernBertDecoder", "Olmoe", "Persimmon", "StableLm"}


def causal_lm(name: str) -> TinyModel:
    """Return a tiny model of this name with LoRA on its linear layers, in training mode."""
    options = {**_SMALL, **OPTIONS[name]}
    if name in _NO_HEAD_DIM:
        del options["head_dim"]
    tiny = language_model(name, _TARGETS, **options)
    tiny.model.train()
    for module in tiny.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return tiny


def seeded_loss(tiny: TinyModel) -> torch.Tensor:
    """Return the loss, with the same random numbers in each call (routers draw some)."""
    torch.manual_seed(5)
    return tiny.loss()
