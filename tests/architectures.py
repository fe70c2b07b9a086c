"""Every architecture of transformers in a tiny size: its defaults, shrunk by their names."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

AUTO = {  # the auto class -> the mapping of transformers that lists what it builds
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
MOST_PARAMETERS = 30_000_000
VOCABULARY = 96

# The first expression that matches the whole name of an integer gives its value in a tiny model.
_INTEGERS = [
    (r".*vocab_size.*", VOCABULARY),
    (r"(num|n)_(shared|zero)_expert.*", 1),
    (r".*(experts_per_tok|topk|top_k|moe_k|experts_per_token)", 2),
    (r"topk_group|n_group", 1),
    (r".*num.*experts|n_routed_experts", 4),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1),
    (r"num_nextn_predict_layers|(num_)?mtp_layers", 0),
    (r".*lora_rank|rotary_dim", 8),
    (r".*head_dim|d_kv|kv_channels", 8),
    (r".*key_value_heads|.*kv_heads|multi_query_group_num", 2),
    (r".*_heads|n_head", 4),
    (r".*intermediate_size.*|.*ffn_dim|d_ff|n_inner|.*mlp_dim|ffn_hidden_size|inner_dim", 48),
    (r".*_layers|n_layers?|depth", 2),
    (
        r".*hidden_size|d_model|n_embd|n_embed|dim|.*_dim|.*embedding_size|width|.*_width|d_inner",
        32,
    ),
    (r"image_size|img_size|input_size", 32),
    (r"patch_size", 8),
    (r"max_position_embeddings|n_positions|max_(source|target)_positions", 64),
]
# What some architectures need instead. The first variant that runs is taken.
_VARIANTS: list[dict[str, int]] = [
    {},
    {r".*key_value_heads": 4},  # latent attention: one key for each query
    {r".*hidden_size": 512, r".*head_dim": 128},  # sections of rotary dimensions
    {r".*hidden_size|.*_dim|.*_width|.*_heads|num_heads": 2**20},  # as they are
    {r".*_layers|n_layers?": 2**20, r".*hidden_size": 32},
]


def names(auto: str) -> dict[str, str]:
    """Return the model types that an auto class builds, and the class of each."""
    from transformers.models.auto import modeling_auto

    found = getattr(modeling_auto, AUTO[auto]).items()
    return {kind: made if isinstance(made, str) else made[0] for kind, made in found}


def build(auto: str, kind: str) -> nn.Module:
    """Build the tiny model of a type, in eval mode, from a fixed seed."""
    problems = []
    for variant in _VARIANTS:
        try:
            model = build_class(names(auto)[kind], kind, variant)
            with torch.no_grad():
                model(**batch(model))
        except Exception as error:  # whatever transformers raises: the next variant may fit
            problems.append(f"{type(error).__name__}: {error}"[:120])
        else:
            return model
    raise LookupError(f"{kind} cannot be built in a tiny size: {problems}")


def build_class(name: str, kind: str, variant: dict[str, int]) -> nn.Module:
    import transformers

    made = getattr(transformers, name)
    config = _part(_tiny_config(kind, variant), made)
    with torch.device("meta"):
        size = sum(p.numel() for p in made(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{kind} has {size} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = made(config)
    return model.float().eval()


def _tiny_config(kind: str, variant: dict[str, int]) -> Any:
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[kind]()
    return type(default)(**_shrunk(default, [*variant.items(), *_INTEGERS]))


def _shrunk(config: Any, rules: list[tuple[str, int]]) -> dict[str, Any]:
    """Return the options of a configuration that are smaller in a tiny model."""
    changed: dict[str, Any] = {}
    for name, value in vars(config).items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            changed[name] = {"model_type": value.model_type, **_shrunk(value, rules)}
        elif name.endswith(("_token_id", "_token_index")):
            changed[name] = _token(name)
        elif name == "use_cache":
            changed[name] = False
        elif name in ("head_dim", "num_key_value_heads") and value is None:
            changed[name] = {"head_dim": 8, "num_key_value_heads": 4}[name]
        elif isinstance(value, int) and not isinstance(value, bool):
            small = next((new for rule, new in rules if re.fullmatch(rule, name)), None)
            if small is not None and value > small:
                changed[name] = small
    return changed


def _token(name: str) -> int:
    """Return a token of the tiny vocabulary that no batch uses: one for each name."""
    known = ["pad", "bos", "eos", "decoder_start", "image", "video", "audio", "vision_start"]
    word = name.rpartition("_token")[0]
    return known.index(word) if word in known else 20 + sum(map(ord, word)) % 60


def _part(config: Any, made: Any) -> Any:
    """Return the part of a configuration that a class takes: a language model's of several."""
    wanted = getattr(made, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    return next(v for v in vars(config).values() if isinstance(v, wanted))


def batch(model: nn.Module) -> dict[str, Tensor]:
    """Return a batch for the model: tokens, or pixels, or a sound, with tokens to decode."""
    generator = torch.Generator().manual_seed(0)
    name, config = getattr(model, "main_input_name", "input_ids"), model.config
    tokens = torch.randint(84, VOCABULARY, (2, 6), generator=generator)
    tokens[:, -1] = 2  # the end of a sequence, at which some classifiers read
    made: dict[str, Tensor] = {}
    if name == "pixel_values":
        made[name] = torch.randn(_image(config), generator=generator)
    elif name in ("input_features", "input_values"):
        made[name] = torch.randn(_sound(config), generator=generator)
    else:
        made = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = tokens.flip(1)
    return made


def _image(config: Any) -> tuple[int, ...]:
    vision = getattr(config, "vision_config", getattr(config, "encoder", config))
    size = getattr(vision, "image_size", 32)
    side = size if isinstance(size, int) else max(size)
    return (2, getattr(vision, "num_channels", 3), side, side)


def _sound(config: Any) -> tuple[int, ...]:
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        return (2, config.num_mel_bins, 2 * config.max_source_positions)
    return (2, 4000)
