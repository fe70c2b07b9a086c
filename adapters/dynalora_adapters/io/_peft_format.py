"""peft's file format: its configuration, and the names of its tensors.

The format has no specification. The keys here are those of peft 0.21's configurations and of its
``get_peft_model_state_dict``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dynalora_adapters._bases import linear_shape
from dynalora_adapters._config import AdapterConfig, Names
from dynalora_adapters._layers import AdapterLinear
from dynalora_adapters._models import first_names, inside
from dynalora_adapters._targets import bias_tensors, head_names, is_all_linear, matches
from dynalora_adapters._tasks import task_type
from dynalora_adapters.io._peft_kinds import IGNORED, KINDS, SHARED, WITH_PEFT
from dynalora_adapters.io._peft_layers import MODEL_OPTIONS, check_layer_options

PREFIX = "base_model.model."
# Modules that peft saves and expects for a task, even if modules_to_save does not name them.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_GENERATION = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def decode_config(raw: Mapping[str, Any]) -> AdapterConfig:
    """Translate peft's configuration into ours.

    Raises:
        ValueError: If its kind is unknown, an option is missing, or an option is not implemented
            here.
        TypeError: If an option has the wrong type.
    """
    name = raw.get("peft_type")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"peft_type must be one of {sorted(KINDS)}, got {name!r}; {_remedy(raw)}.")
    options = {**SHARED, **kind.options}
    accepted = {**kind.accepted, "bias": kind.biases.values()}
    for option, value in raw.items():
        if option not in {*options, *IGNORED, *MODEL_OPTIONS, *kind.ignored}:
            _check_implemented(option, value, accepted.get(option, ()))
    check_layer_options(raw)
    given = {ours: raw[theirs] for theirs, ours in options.items() if raw.get(theirs) is not None}
    given["bias"] = {v: k for k, v in kind.biases.items()}.get(raw.get("bias") or "none")
    for theirs in kind.required:
        if options[theirs] not in given:
            raise ValueError(f"{theirs} is missing; add the value used in training.")
    return kind.config_class(**given)


def _check_implemented(option: str, value: object, accepted: Collection[object]) -> None:
    if any(value is one or (isinstance(value, str) and value == one) for one in accepted):
        return
    if value is None or value is False or value in (0, "", [], {}):
        return
    raise ValueError(
        f"{option}={value!r} is not implemented here, and may change what the adapter computes; "
        f"{WITH_PEFT}. Or remove the option if it has no effect on the forward pass."
    )


def _remedy(raw: Mapping[str, Any]) -> str:
    if "num_virtual_tokens" not in raw:
        return WITH_PEFT
    return "load it with peft (prompts are no layers: the optimizer cannot choose among them)"


def encode_config(
    model: nn.Module, tree: Mapping[str, nn.Module], config: AdapterConfig
) -> dict[str, Any]:
    """Translate our configuration of an adapted model into peft's configuration."""
    name, kind = next((n, k) for n, k in KINDS.items() if k.config_class is type(config))
    layers = [module for module in tree.values() if isinstance(module, AdapterLinear)]
    targets, exclude = _spelling(tree, config, excludes=kind.excludes)
    excluded = {"exclude_modules": _as_json(exclude) or None} if kind.excludes else {}
    options = {theirs: getattr(config, ours) for theirs, ours in kind.options.items()}
    return {
        "peft_type": name,
        "task_type": _safe_task(model, tree, config),
        "base_model_name_or_path": _origin(model),
        "inference_mode": True,
        "target_modules": _as_json(targets),
        **excluded,
        "modules_to_save": _as_json(config.trainable) or None,
        "fan_in_fan_out": any(layer.shape.transposed for layer in layers),
        "bias": kind.biases[config.bias],
        **options,
    }


def _origin(model: nn.Module) -> str | None:
    """Return the name or folder from which transformers loaded the model."""
    return str(getattr(getattr(model, "config", None), "name_or_path", None) or "") or None


def _as_json(names: Names) -> str | list[str]:
    return names if isinstance(names, str) else list(names)


def _spelling(
    tree: Mapping[str, nn.Module], config: AdapterConfig, *, excludes: bool
) -> tuple[Names, Names]:
    """Return the shortest targets and exclusions with which peft adapts the same modules.

    peft looks at every module, linear or not. It sees a module that has several names once, under
    its first name.
    """
    modules = first_names(tree)
    adapted = [name for name, module in modules.items() if isinstance(module, AdapterLinear)]
    exact = "|".join(re.escape(name) for name in adapted)
    as_given = (config.targets, config.exclude if excludes else ())
    spellings: list[tuple[Names, Names]] = [as_given, (adapted, ())]
    for targets, exclude in spellings:
        kept = [n for n in modules if not _guarded(n, config.trainable) and not matches(exclude, n)]
        if not is_all_linear(targets) and [n for n in kept if matches(targets, n)] == adapted:
            return targets, exclude
    return f"(?:{exact})", ()


def _guarded(name: str, trainable: Names) -> bool:
    """Whether peft never adapts this: it is one of the modules to save, or inside one."""
    parts = name.split(".")
    return any(matches(trainable, ".".join(parts[: end + 1])) for end in range(len(parts)))


def _safe_task(
    model: nn.Module, tree: Mapping[str, nn.Module], config: AdapterConfig
) -> str | None:
    """Return the task type; None if peft would then expect more than file or model have."""
    task = task_type(model)
    if task in _GENERATION and not hasattr(model, "prepare_inputs_for_generation"):
        return None
    saved = head_names(tree, config.trainable)
    expected = head_names(tree, _TASK_HEADS.get(task or "", ()))
    return task if all(inside(name, saved) for name in expected) else None


def layer_keys(name: str, layer_class: type[AdapterLinear]) -> dict[str, str]:
    """Return the parameters of the layer ``name`` and their keys in the file."""
    return {param: f"{PREFIX}{name}.{key}" for param, key in layer_class.peft_names.items()}


def _class_of(module: nn.Module, config: AdapterConfig) -> type[AdapterLinear]:
    if isinstance(module, AdapterLinear):
        return type(module)
    return config.class_for(module) or config.layer_class


def layer_shapes(
    tree: Mapping[str, nn.Module], names: Collection[str], config: AdapterConfig
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a file must have for these layers, by key."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        base = linear_shape(tree[name])
        assert base is not None
        keys = layer_keys(name, _class_of(tree[name], config))
        for param, shape in config.param_shapes(name, base).items():
            shapes[keys[param]] = shape
    return shapes


def head_tensors(
    model: nn.Module,
    tree: Mapping[str, nn.Module],
    config: AdapterConfig,
    adapted: Collection[str],
) -> dict[str, Tensor]:
    """Return the biases that train, and all that the modules to save hold, by key."""
    biases = bias_tensors(model, config, adapted)
    return {f"{PREFIX}{name}": bias for name, bias in biases.items()} | {
        f"{PREFIX}{name}.{key}": tensor
        for name in head_names(tree, config.trainable)
        for key, tensor in tree[name].state_dict(keep_vars=True).items()
    }


def known_names(config: AdapterConfig, tree: Mapping[str, nn.Module]) -> AdapterConfig:
    """Drop names that match no module of this model. peft writes and accepts such entries.

    If no target matches, all are kept, so that the error names them.
    """

    def known(names: Names) -> Names:
        if isinstance(names, str):
            return names if any(matches(names, module) for module in tree) else ()
        return tuple(n for n in names if any(matches((n,), module) for module in tree))

    return replace(
        config,
        targets=known(config.targets) or config.targets,
        exclude=known(config.exclude),
        trainable=known(config.trainable),
    )
