"""The kinds of adapter in peft's files, and peft's names for their options."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dynalora_adapters._config import AdapterConfig, LoRAConfig
from dynalora_adapters._vera import VeRAConfig


@dataclass(frozen=True)
class Kind:
    """How one kind of adapter is written to a file.

    Attributes:
        config_class: Our configuration.
        required: peft's options that must be in a file.
        options: peft's names for our options, without those that all kinds share.
        ignored: peft's options that do not change the forward pass of a saved adapter.
        accepted: For some of peft's other options, the values with which peft computes what we do.
            All options that are named nowhere here must be off: None, False, zero or empty.
        biases: For each value of our option ``bias``, that of peft's.
        excludes: Whether peft has ``exclude_modules`` for this kind.
    """

    config_class: type[AdapterConfig]
    required: tuple[str, ...]
    options: Mapping[str, str]
    ignored: Collection[str]
    accepted: Mapping[str, Collection[object]]
    biases: Mapping[str, str]
    excludes: bool = True


WITH_PEFT = (
    "load it with peft.PeftModel.from_pretrained: the optimizer drives peft's layers with the same "
    "line"
)
IF_BY_PEFT = f"If peft wrote it for this model, {WITH_PEFT}."  # ends an error of ours
SHARED = {
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "modules_to_save": "trainable",
}
IGNORED = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "revision"),
    *("base_model_name_or_path", "inference_mode", "runtime_config"),
    "fan_in_fan_out",  # the base module shows the layout of its weight
}
KINDS = {
    "LORA": Kind(
        config_class=LoRAConfig,
        required=("target_modules", "r", "lora_alpha"),
        options={
            "r": "rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "use_rslora": "rslora",
            "rank_pattern": "rank_pattern",
            "alpha_pattern": "alpha_pattern",
        },
        # These have an effect only with another option (use_qalora, megatron_config,
        # init_lora_weights), which must be off.
        ignored={
            *("qalora_group_size", "megatron_core"),
            *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        },
        # Initialisations that do not change the base weights. pissa, olora, loftq and others do.
        accepted={"init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")},
        biases={"none": "none", "adapted": "lora_only", "all": "all"},
    ),
    "VERA": Kind(
        config_class=VeRAConfig,
        required=("target_modules", "r"),
        options={
            "r": "rank",
            "d_initial": "d_initial",
            "projection_prng_key": "key",
            "save_projection": "save_projection",
            "vera_dropout": "dropout",
        },
        ignored=(),
        accepted={"init_weights": (True, False)},
        biases={"none": "none", "adapted": "vera_only", "all": "all"},
        excludes=False,
    ),
}
