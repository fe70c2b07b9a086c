"""The kinds of adapter in peft's files, and what peft calls their options."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dynalora_adapters._config import AdapterConfig, LoRAConfig
from dynalora_adapters._vera import VeRAConfig


@dataclass(frozen=True)
class Kind:
    """How one kind of adapter is written.

    Attributes:
        config_class: Our configuration.
        required: peft's options that a file cannot lack.
        options: What peft calls our options, beside those that every kind has.
        ignored: peft's options that do not change the forward of a saved adapter.
        accepted: Values that mean what we do, for options that are neither of ours nor ignored.
            Any other option must be off: None, False, zero or empty.
        excludes: Whether peft knows ``exclude_modules`` for this kind.
    """

    config_class: type[AdapterConfig]
    required: tuple[str, ...]
    options: Mapping[str, str]
    ignored: Collection[str]
    accepted: Mapping[str, Collection[object]]
    excludes: bool = True


SHARED = {
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "modules_to_save": "trainable",
}
IGNORED = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "revision"),
    *("base_model_name_or_path", "inference_mode", "runtime_config"),
    "fan_in_fan_out",  # the base module itself shows how its weight is laid out
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
        # Without the option they belong to (use_qalora, megatron_config, init_lora_weights),
        # these have no effect.
        ignored={
            *("qalora_group_size", "megatron_core"),
            *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        },
        # Initialisations that leave the base weights alone; pissa, olora, loftq and others do not.
        accepted={
            "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
            "bias": ("none",),
        },
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
        accepted={"init_weights": (True, False), "bias": ("none",)},
        excludes=False,
    ),
}
