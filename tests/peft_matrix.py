"""The configurations that peft's own tests try, and tiny models of the kinds that it tries them on.

Read off tests/test_custom_models.py, test_decoder_models.py, test_encoder_decoder_models.py,
test_feature_extraction_models.py and test_seq_classifier.py of peft 0.21, with the options of
LoRA and VeRA that those leave out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from architectures import batch, build_class
from torch import Tensor, nn

LORA, VERA, TOKENS = "LoraConfig", "VeraConfig", "TrainableTokensConfig"


class Case(NamedTuple):
    """A configuration of peft on a model."""

    group: str
    model: str
    kind: str
    options: dict[str, Any]

    def __str__(self) -> str:
        options = [f"{name}={value}" for name, value in self.options.items()]
        return " ".join([self.model, self.kind.removesuffix("Config"), *options])


class Attention(nn.Module):
    """A layer of torch whose projections are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(10, 2)
        self.lin0 = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0])


class Product(nn.Module):
    """A linear map by a parameter that is no linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _chain(**parts: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(parts))


def _convolution(layer: nn.Module, name: str, size: int) -> nn.Module:
    return _chain(**{name: layer}, relu=nn.ReLU(), flat=nn.Flatten(), lin0=nn.Linear(size, 2))


def _looked_up() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return _chain(
        emb=nn.Embedding(100, 5),
        conv1d=Conv1D(1, 5),
        relu=nn.ReLU(),
        flat=nn.Flatten(),
        lin0=nn.Linear(10, 2),
    )


def _mlp(**more: nn.Module) -> nn.Module:
    return _chain(lin0=nn.Linear(10, 20), relu=nn.ReLU(), **more, lin1=nn.Linear(20, 2))


# A model of plain torch, and the shape of its input.
CUSTOM: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (_mlp, (4, 10)),
    "MLP with LayerNorm": (lambda: _mlp(norm=nn.LayerNorm(20)), (4, 10)),
    "embedding, Conv1D": (_looked_up, (4, 10)),
    "Conv1d": (lambda: _convolution(nn.Conv1d(1, 1, 2), "conv1d", 9), (4, 1, 10)),
    "Conv1d, kernel 1": (lambda: _convolution(nn.Conv1d(3, 10, 1), "conv1d", 100), (4, 3, 10)),
    "Conv2d": (lambda: _convolution(nn.Conv2d(5, 10, 3), "conv2d", 10), (4, 5, 3, 3)),
    "Conv2d, groups": (
        lambda: _convolution(nn.Conv2d(16, 16, 3, groups=8), "conv2d", 16),
        (4, 16, 3, 3),
    ),
    "Conv3d": (lambda: _convolution(nn.Conv3d(5, 10, 3), "conv3d", 10), (4, 5, 3, 3, 3)),
    "MultiheadAttention": (Attention, (3, 4, 10)),
    "parameter": (lambda: _chain(lin0=Product(), relu=nn.ReLU(), lin1=nn.Linear(2, 2)), (4, 10)),
}
_ON_MLP: list[tuple[str, dict[str, Any]]] = [
    (LORA, {"target_modules": "lin0"}),
    (LORA, {"target_modules": ["lin0"]}),
    (LORA, {"target_modules": ["lin1"]}),
    (LORA, {"target_modules": ["lin0", "lin1"]}),
    (LORA, {"target_modules": "all-linear"}),
    (LORA, {"target_modules": r"lin\d", "exclude_modules": ["lin1"]}),
    (LORA, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    (LORA, {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1}),
    (LORA, {"target_modules": ["lin0", "lin1"], "use_rslora": True}),
    (LORA, {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}}),
    (LORA, {"target_modules": ["lin0", "lin1"], "alpha_pattern": {"lin0": 3}}),
    (LORA, {"target_modules": ["lin0"], "use_dora": True}),
    (LORA, {"target_modules": ["lin0", "lin1"], "use_dora": True}),
    (LORA, {"target_modules": "lin1", "use_dora": True, "lora_alpha": 32}),
    (LORA, {"target_modules": ["lin0", "lin1"], "lora_bias": True, "lora_alpha": 32}),
    (LORA, {"target_modules": ["lin0"], "bias": "all"}),
    (LORA, {"target_modules": ["lin0"], "bias": "lora_only"}),
    (LORA, {"target_modules": ["lin0"], "bias": "all", "modules_to_save": ["lin1"]}),
    (LORA, {"target_modules": ["lin0"], "bias": "lora_only", "modules_to_save": ["lin1"]}),
    (LORA, {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"]}),
    *((LORA, {"target_modules": ["lin0"], "r": 4, "init_lora_weights": how})
      for how in (False, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_2", "mica")),
    (LORA, {"target_modules": ["lin0"], "velora_config": {"num_groups": 2}}),
    (LORA, {"target_modules": ["lin0"], "monteclora_config": {"num_samples": 2}}),
    (LORA, {"target_modules": ["lin0"], "r": 4, "kasa_config": {}}),
    (LORA, {"target_modules": ["lin0"],
            "use_bdlora": {"target_modules_bd_a": ["lin0"], "nblocks": 2, "match_strict": False}}),
    (VERA, {"target_modules": "lin0"}),
    (VERA, {"target_modules": ["lin0"]}),
    (VERA, {"target_modules": ["lin1"]}),
    (VERA, {"target_modules": ["lin0", "lin1"]}),
    (VERA, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    (VERA, {"target_modules": ["lin0", "lin1"], "save_projection": False}),
    (VERA, {"target_modules": ["lin0"], "bias": "all"}),
    (VERA, {"target_modules": ["lin0"], "bias": "vera_only"}),
    # One of each other kind of adapter.
    ("AdaLoraConfig", {"target_modules": ["lin0"], "total_step": 1}),
    ("AdamssConfig", {"target_modules": ["lin0"], "r": 8}),
    ("BeftConfig", {"target_modules": ["lin0"]}),
    ("BOFTConfig", {"target_modules": ["lin1"], "boft_block_size": 2}),
    ("C3AConfig", {"target_modules": ["lin0"], "block_size": 10}),
    ("DeftConfig", {"target_modules": ["lin0"]}),
    ("DeloraConfig", {"target_modules": ["lin0"], "r": 2}),
    ("FourierFTConfig", {"target_modules": ["lin0"], "n_frequency": 10}),
    ("FrodConfig", {"target_modules": ["lin0"], "sparse_rate": 0.01}),
    ("GloraConfig", {"target_modules": ["lin0"]}),
    ("GraloraConfig", {"target_modules": ["lin0"], "r": 2}),
    ("HiraConfig", {"target_modules": ["lin0"]}),
    ("HRAConfig", {"target_modules": ["lin0"]}),
    ("IA3Config", {"target_modules": ["lin0"], "feedforward_modules": []}),
    ("LilyConfig", {"target_modules": ["lin0"], "stride_A": 1, "num_B": 2}),
    ("LoHaConfig", {"target_modules": ["lin0"]}),
    ("LoKrConfig", {"target_modules": ["lin0"]}),
    ("MissConfig", {"target_modules": ["lin0"], "r": 2}),
    ("OFTConfig", {"target_modules": ["lin0"], "r": 2, "oft_block_size": 0}),
    ("OSFConfig", {"target_modules": ["lin0"]}),
    ("PeanutConfig", {"target_modules": ["lin0"], "r": 4, "depth": 1, "act_fn": "relu"}),
    ("PsoftConfig", {"target_modules": ["lin0"], "r": 4, "psoft_alpha": 4}),
    ("PveraConfig", {"target_modules": ["lin0"], "r": 8}),
    ("RandLoraConfig", {"target_modules": ["lin0"], "r": 8, "randlora_alpha": 1}),
    ("RoadConfig", {"target_modules": ["lin0"], "group_size": 2}),
    ("ShiraConfig", {"target_modules": ["lin0"], "r": 1, "init_weights": False}),
    ("SupertuningConfig", {"target_modules": ["lin0"], "sparsity": 0.9}),
    ("TinyLoraConfig", {"target_modules": ["lin0"], "r": 2, "u": 16}),
    ("UniLoraConfig", {"target_modules": ["lin0"], "theta_d_length": 101}),
    ("VBLoRAConfig", {"target_modules": ["lin0"], "vector_length": 1, "num_vectors": 5}),
    ("WaveFTConfig", {"target_modules": ["lin0"], "n_frequency": 8}),
]  # fmt: skip
_CUSTOM_CASES: list[tuple[str, str, dict[str, Any]]] = [
    *(("MLP", kind, options) for kind, options in _ON_MLP),
    ("MLP with LayerNorm", "LNTuningConfig", {"target_modules": ["norm"]}),
    ("MLP with LayerNorm", LORA, {"target_modules": ["lin0"], "modules_to_save": ["norm"]}),
    ("MLP with LayerNorm", LORA, {"target_modules": ["lin0"], "bias": "all"}),
    ("embedding, Conv1D", LORA, {"target_modules": ["conv1d"]}),
    ("embedding, Conv1D", LORA, {"target_modules": ["emb"]}),
    ("embedding, Conv1D", LORA, {"target_modules": ["emb", "conv1d"]}),
    ("embedding, Conv1D", LORA, {"target_modules": ["conv1d"], "modules_to_save": ["emb"]}),
    ("embedding, Conv1D", LORA, {"target_modules": ["conv1d"], "bias": "lora_only"}),
    ("embedding, Conv1D", LORA, {"target_modules": ["conv1d"], "use_dora": True}),
    ("embedding, Conv1D", LORA, {"target_modules": ["emb"], "use_dora": True}),
    ("embedding, Conv1D", LORA, {"target_modules": ["emb", "conv1d"], "use_dora": True}),
    (
        "embedding, Conv1D",
        LORA,
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
    ),
    ("embedding, Conv1D", TOKENS, {"target_modules": ["emb"], "token_indices": [0, 9]}),
    *(
        (model, LORA, {"target_modules": targets, **more})
        for model, name in [
            ("Conv1d", "conv1d"),
            ("Conv1d, kernel 1", "conv1d"),
            ("Conv2d", "conv2d"),
            ("Conv2d, groups", "conv2d"),
            ("Conv3d", "conv3d"),
        ]
        for targets, more in [
            ([name], {}),
            ([name, "lin0"], {}),
            (f".*({name}|lin0)", {}),
            ([name], {"use_dora": True}),
            ([name], {"lora_bias": True, "lora_alpha": 32}),
        ]
    ),
    ("MultiheadAttention", LORA, {"target_modules": ["mha"]}),
    ("MultiheadAttention", LORA, {"target_modules": ["mha", "lin0"]}),
    ("MultiheadAttention", LORA, {"target_modules": ["lin0"]}),
    ("MultiheadAttention", LORA, {"target_modules": "all-linear"}),
    ("parameter", LORA, {"target_parameters": ["lin0.weight"]}),
]  # fmt: skip

# The models of transformers.
_MODELS = [  # the task, the class and the type
    ("CAUSAL_LM", "OPTForCausalLM", "opt"),
    ("CAUSAL_LM", "GPT2LMHeadModel", "gpt2"),
    ("CAUSAL_LM", "GPTJForCausalLM", "gptj"),
    ("CAUSAL_LM", "LlamaForCausalLM", "llama"),
    ("CAUSAL_LM", "MistralForCausalLM", "mistral"),
    ("CAUSAL_LM", "Qwen2ForCausalLM", "qwen2"),
    ("CAUSAL_LM", "Gemma3ForCausalLM", "gemma3_text"),
    ("SEQ_2_SEQ_LM", "T5ForConditionalGeneration", "t5"),
    ("SEQ_2_SEQ_LM", "BartForConditionalGeneration", "bart"),
    ("FEATURE_EXTRACTION", "BertModel", "bert"),
    ("FEATURE_EXTRACTION", "RobertaModel", "roberta"),
    ("FEATURE_EXTRACTION", "DebertaModel", "deberta"),
    ("FEATURE_EXTRACTION", "DebertaV2Model", "deberta-v2"),
    ("SEQ_CLS", "BertForSequenceClassification", "bert"),
    ("SEQ_CLS", "RobertaForSequenceClassification", "roberta"),
    ("SEQ_CLS", "LlamaForSequenceClassification", "llama"),
]
_GROUPS = {
    "CAUSAL_LM": "decoders",
    "SEQ_2_SEQ_LM": "encoder-decoders",
    "FEATURE_EXTRACTION": "feature extraction",
    "SEQ_CLS": "classification of sequences",
}
EMBEDDING, HEAD = "<embedding>", "<head>"  # in options: the names that the model tells
_WITH_HEAD = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_TEXT: list[tuple[str, dict[str, Any]]] = [
    (LORA, {"lora_alpha": 32, "lora_dropout": 0.05}),
    (LORA, {"lora_alpha": 32, "trainable_token_indices": [0, 1, 3]}),
    (VERA, {"r": 8, "vera_dropout": 0.05, "projection_prng_key": 0xFF}),
    (LORA, {"target_modules": "all-linear"}),
    (LORA, {"layers_to_transform": 0}),
    (LORA, {"layers_to_transform": [1]}),
    (LORA, {"bias": "all"}),
    (LORA, {"bias": "lora_only"}),
    (LORA, {"target_modules": [EMBEDDING]}),
    (LORA, {"modules_to_save": [EMBEDDING]}),
    (LORA, {"use_dora": True}),
    (LORA, {"use_rslora": True, "rank_pattern": {r".*\.0\..*": 2}}),
    (LORA, {"lora_alpha": 32, "alpha_pattern": {r".*\.1\..*": 3}}),
    (VERA, {"r": 8, "layers_to_transform": [1]}),
]  # fmt: skip
_HEADS: list[tuple[str, dict[str, Any]]] = [
    (LORA, {"target_modules": [HEAD]}),
    (LORA, {"target_modules": [HEAD], "ensure_weight_tying": True}),
    (LORA, {"target_modules": [EMBEDDING, HEAD]}),
    (LORA, {"modules_to_save": [HEAD]}),
    (LORA, {"modules_to_save": [EMBEDDING, HEAD]}),
]
_DECODER: list[tuple[str, dict[str, Any]]] = [
    (LORA, {"modules_to_save": [EMBEDDING], "ensure_weight_tying": True}),
    (LORA, {"modules_to_save": [HEAD], "ensure_weight_tying": True}),
    (LORA, {"target_modules": [EMBEDDING], "ensure_weight_tying": True}),
    (LORA, {"lora_alpha": 32, "alora_invocation_tokens": [1]}),
    (LORA, {"lora_alpha": 32, "alora_invocation_tokens": [1000]}),
]
_LLAMA: list[tuple[str, dict[str, Any]]] = [
    (LORA, {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
            "layers_to_transform": [1]}),
    (LORA, {"layer_replication": [[0, 1], [0, 2]]}),
    ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
    ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 8}),
]  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield all configurations."""
    for model, kind, options in _CUSTOM_CASES:
        yield Case("custom models", model, kind, options)
    for task, model, _ in _MODELS:
        rows = list(_TEXT)
        rows += _HEADS if task in _WITH_HEAD else []
        rows += _DECODER if task == "CAUSAL_LM" else []
        rows += _LLAMA if model == "LlamaForCausalLM" else []
        for kind, options in rows:
            yield Case(_GROUPS[task], model, kind, {"task_type": task, **options})


# Weights of these models are tied, so that embedding and head are one parameter.
_TIED = {"OPTForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM"}
_TIED |= {"T5ForConditionalGeneration", "BartForConditionalGeneration"}
# peft's options that we do not read.
_OPTIONS = (
    *("use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "kasa_config"),
    *("alora_invocation_tokens", "layer_replication", "velora_config", "monteclora_config"),
    "use_bdlora",
)
_INITIALISATIONS = ("olora", "pissa", "pissa_niter_2", "mica")


def obstacle(case: Case) -> str | None:
    """Return why we refuse peft's file of a configuration, None if we read it."""
    options, targets = case.options, case.options.get("target_modules", [])
    if "num_virtual_tokens" in options:
        return "prompts instead of layers"
    if case.kind not in (LORA, VERA):
        return "another kind of adapter"
    if found := [f"`{option}`" for option in _OPTIONS if option in options]:
        return found[0]
    if options.get("init_lora_weights") in _INITIALISATIONS:
        return "`init_lora_weights` that changes the base weights, or freezes a factor"
    if "conv" in str(targets) and "Conv1D" not in case.model:
        return "a convolution in `target_modules`"
    if case.model == "MultiheadAttention" and targets != ["lin0"]:
        return "`nn.MultiheadAttention` in `target_modules`"
    return _tied_obstacle(case) if case.model in _TIED else None


def _tied_obstacle(case: Case) -> str | None:
    """Return why a configuration cannot be read into a model with tied weights."""
    trains, adapts = ({EMBEDDING, HEAD} & {*case.options.get(option, [])}
                      for option in ("modules_to_save", "target_modules"))  # fmt: skip
    knows = case.model != "GPT2LMHeadModel" or HEAD in trains | adapts  # peft ties no "wte"
    together = knows and "ensure_weight_tying" in case.options
    if trains and not together:
        return "one of two tied weights in `modules_to_save`"
    if adapts and together:
        return "`ensure_weight_tying` with tied weights in `target_modules`"
    return None


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a model from a fixed seed, in eval mode, and keyword arguments for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in CUSTOM:
            make, shape = CUSTOM[name]
            model = make().eval()
            x = torch.randint(0, 100, shape) if hasattr(model, "emb") else torch.randn(shape)
            return model, {"x" if isinstance(model, Attention) else "input": x}
        _, _, kind = next(row for row in _MODELS if row[1] == name)
        model = build_class(name, kind, {})
        return model, batch(model)


def named(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """Put the names of the model's embedding and head into options."""
    modules = {module: name for name, module in model.named_modules()}
    ends: dict[str, str] = {}
    if hasattr(model, "get_input_embeddings"):
        reader = model.get_encoder() if model.config.is_encoder_decoder else model
        ends[EMBEDDING] = modules[reader.get_input_embeddings()].rpartition(".")[2]
        ends[HEAD] = modules.get(model.get_output_embeddings(), "")
    return {
        option: [ends.get(one, one) if isinstance(one, str) else one for one in value]
        if isinstance(value, list)
        else value
        for option, value in options.items()
    }
