"""Tiny causal language models of transformers, a batch, and one step of training."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, ROWS, LENGTH = 97, 3, 11
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **TOKENS,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "gpt2": ("GPT2Config", {**NO_DROPOUT, "n_inner": 32}),
    "phi": ("PhiConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0}),
    "cohere": ("CohereConfig", {"logit_scale": 0.3}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 2, "output_router_logits": True}),
}


def build(name: str = "llama", *, tied: bool = False, dtype=torch.float32, **options) -> Any:
    kind, own = CONFIGS[name]
    config = getattr(transformers, kind)(**{**SMALL, **own, "tie_word_embeddings": tied, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        if name == "mixtral":  # the grouped product lacks float64, and old versions of torch a CPU
            model.set_experts_implementation("eager")
        for parameter in model.parameters():  # large enough that logits differ
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).train()


def batch(seed: int = 0, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = ids.clone()
    labels[0, :6] = labels[2, 9:] = -100  # a prompt, and padding
    return {"input_ids": ids, "labels": labels, **more}


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of all parameters that got one."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    named = model.named_parameters()
    return output.loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_same(ours: Any, theirs: Any, tolerance: float) -> None:
    assert ours[1].keys() == theirs[1].keys()
    for found, expected in [(ours[0], theirs[0]), *((ours[1][n], g) for n, g in theirs[1].items())]:
        scale = max(expected.abs().max().item(), 1.0)
        assert (found.double() - expected.double()).abs().max().item() <= tolerance * scale
