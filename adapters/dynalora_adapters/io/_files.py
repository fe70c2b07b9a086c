"""Save and load an adapter, in the file format of peft."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynalora_adapters._config import AdapterConfig
from dynalora_adapters._inject import as_base, check_bare, check_room, install
from dynalora_adapters._injection import (
    active_adapter_of,
    find_injection,
    injection_of,
    name_of,
    note_embeddings,
    placed,
)
from dynalora_adapters._layers import AdapterLinear
from dynalora_adapters._models import (
    adapters_of,
    first_names,
    module_tree,
    require_adapters,
    unwrap,
)
from dynalora_adapters._sharded import (
    check_not_fsdp1,
    check_numbers,
    fill,
    is_sharded,
    settle,
    whole,
    write_once,
)
from dynalora_adapters._targets import make_plan
from dynalora_adapters.io._embeddings import changed, embedding_tensors
from dynalora_adapters.io._fit import check_fit
from dynalora_adapters.io._peft_format import (
    PREFIX,
    decode_config,
    encode_config,
    head_tensors,
    known_names,
    layer_keys,
)
from dynalora_adapters.io._peft_kinds import IF_BY_PEFT
from dynalora_adapters.io._peft_layers import in_layers, with_tied
from dynalora_adapters.io._peft_limits import misread, unreadable
from dynalora_adapters.io._peft_shared import as_saved, share, shared_tensors
from dynalora_adapters.io._storage import CONFIG_NAME, read_adapter, write_adapter

logger = logging.getLogger(__name__)


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None
) -> None:
    """Write the adapters and the trainable modules of ``model`` into the folder ``path``.

    The files ``adapter_model.safetensors`` and ``adapter_config.json`` have peft's format:
    ``peft.PeftModel.from_pretrained(base_model, path)`` loads them; if peft would load something
    else, a warning in the log names the modules. Inactive adapters are saved like active ones, and
    merged adapters like those that are not merged. The folder is created if it does not exist. If
    writing fails, older files in it are not damaged.

    Args:
        model: A model adapted by ``inject`` or ``load_adapter``. It may be wrapped in
            DistributedDataParallel or by ``torch.compile``, or sharded by ``fully_shard``: then
            all processes must call this, and one of them writes.
        path: The folder.
        name: The adapter to save, if the model has several; None for the active one.

    Raises:
        ValueError: If the model has no adapters, or none of this name.
        OSError: If the files cannot be written.
    """
    model = unwrap(model)
    if find_injection(model) is None:
        require_adapters(model)
    with placed(model, name_of(injection_of(model), name)):
        _save(model, Path(path))


def _save(model: nn.Module, folder: Path) -> None:
    layers = require_adapters(model)
    settle(model)
    record = active_adapter_of(model)
    config = as_saved(record.config, layers)
    tree = module_tree(model)
    own = {**_layer_tensors(layers), **shared_tensors(config, layers)}
    extra = embedding_tensors(model, PREFIX) if record.embeddings else {}
    tensors = {**own, **head_tensors(model, tree, config, layers)}
    tensors |= {key: extra[key] for key in record.embeddings}
    check_numbers(tensors)
    for notice in unreadable(model, tree, layers, config.trainable):
        logger.warning(notice)
    sharded = any(map(is_sharded, model.parameters()))
    dense = {key: _detached_copy(tensor) for key, tensor in tensors.items()}
    encoded = encode_config(model, tree, config)
    write_once(lambda: write_adapter(folder, encoded, dense), sharded=sharded)


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None
) -> nn.Module:
    """Load an adapter that ``save_adapter`` or peft's ``save_pretrained`` wrote, in place.

    A model without adapters gets the adapters that the file describes. If the model has adapters
    already, only the weights are loaded; layers, ranks and scalings must agree, and for VeRA the
    key. Dropout may differ. Everything is checked before the model is changed. No code in the files
    is executed. Tensors are converted to the dtype and device of the parameters. VeRA's shared
    matrices are taken from the file or, if it does not contain them, drawn from its key.

    Args:
        model: A model without adapters, or one adapted by this package.
        path: The folder with ``adapter_model.safetensors`` and ``adapter_config.json``.
        name: The adapter that gets the weights; None for the active one. If the model has none of
            this name, it gets one, as from ``inject``.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: If one of the two files is missing.
        ValueError: If a file is damaged, uses an option that is not implemented here, or does not
            fit the model.
    """
    folder = Path(path)
    try:
        _load(model, folder, name)
    except RecursionError as error:  # before any change: the configuration is read first
        raise ValueError(f"{folder / CONFIG_NAME} is nested too deeply ({error}).") from error
    return model


def _load(model: nn.Module, folder: Path, name: str | None) -> None:
    raw, tensors = read_adapter(folder)
    try:
        config = decode_config(raw)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    check_not_fsdp1(model)
    bare = unwrap(model)
    record = find_injection(bare)
    if record is not None and (name is None or name in record.adapters):
        with placed(bare, name_of(record, name)):
            _load_into_adapters(bare, adapters_of(bare), config, tensors, folder)
    else:
        check_room(model, name, config)
        with as_base(bare):
            _load_into_bare(model, raw, config, tensors, folder, name=name)


def _load_into_bare(
    model: nn.Module,
    raw: Mapping[str, Any],
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    name: str | None,
) -> None:
    check_bare(model)
    tree = module_tree(model)
    misfit = f"{folder / CONFIG_NAME} does not fit the model"
    try:
        config = with_tied(known_names(config, tree), raw, model)
        config = in_layers(config, raw, first_names(tree))
        plan = make_plan(model, config)
    except ValueError as error:
        raise ValueError(f"{misfit}: {error} {IF_BY_PEFT}") from error
    if problem := misread(model, tree, raw, plan.bases, config.trainable):
        raise ValueError(f"{misfit}: {problem}")
    heads, found = _whole_modules(model, tree, config, tensors, plan.bases)
    check_fit(tree, plan.bases, config, tensors, heads={**heads, **found}, folder=folder)
    with torch.random.fork_rng(devices=[]):  # what the layers draw is overwritten below
        layers = config.build(plan.bases)
    share(config, layers, tensors)
    replaced = changed(tensors, found)
    _check_alone(model, replaced, folder, others=find_injection(model) is not None)
    with placed(model, install(model, name, config, plan, layers)):
        heads = head_tensors(model, module_tree(model), config, layers)
        _copy(tensors, {**_layer_tensors(layers), **heads, **found})
        note_embeddings(model, replaced)


def _load_into_adapters(
    model: nn.Module,
    layers: Mapping[str, AdapterLinear],
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    folder: Path,
) -> None:
    settle(model)
    tree = module_tree(model)
    for name, layer in layers.items():
        _check_kind(name, layer, config, folder)
    heads, found = _whole_modules(model, tree, active_adapter_of(model).config, tensors, layers)
    check_fit(tree, layers, config, tensors, heads={**heads, **found}, folder=folder)
    for name, layer in layers.items():
        _check_agrees(name, layer, config, folder)
    replaced = changed(tensors, found)
    _check_alone(model, replaced, folder, others=len(injection_of(model).adapters) > 1)
    share(config, layers, tensors)
    note_embeddings(model, replaced)
    _copy(tensors, {**_layer_tensors(layers), **heads, **found})


def _whole_modules(
    model: nn.Module,
    tree: Mapping[str, nn.Module],
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    adapted: Collection[str],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what the file sets beside adapters: what trains too, and embeddings in the file."""
    heads = head_tensors(model, tree, config, adapted)
    known = embedding_tensors(model, PREFIX)
    return heads, {k: v for k, v in known.items() if k in tensors and k not in heads}


def _check_alone(
    model: nn.Module, replaced: Collection[str], folder: Path, *, others: bool
) -> None:
    if replaced and others:
        raise ValueError(
            f"{folder} replaces {sorted(replaced)[0]} of the base, which the other adapters of the "
            f"model ({', '.join(injection_of(model).adapters)}) use too; load it into a model of "
            f"its own."
        )


def _check_kind(name: str, layer: AdapterLinear, config: AdapterConfig, folder: Path) -> None:
    if not isinstance(layer, config.layer_class):
        raise ValueError(
            f"{folder / CONFIG_NAME} is for {config.layer_class.__name__}, but {name} is a "
            f"{type(layer).__name__}; call remove(model) first."
        )


def _check_agrees(name: str, layer: AdapterLinear, config: AdapterConfig, folder: Path) -> None:
    if layer.merged:
        raise ValueError(f"{name} is merged into its base; call unmerge(model) before loading.")
    for option, value in config.layer_options(name).items():
        if getattr(layer, option) != value:
            raise ValueError(
                f"{folder / CONFIG_NAME} says {option}={value!r} for {name}, but the model has "
                f"{getattr(layer, option)!r}; call remove(model) first to load it as saved."
            )


def _layer_tensors(layers: Mapping[str, AdapterLinear]) -> dict[str, Tensor]:
    """Return the parameters of the adapters, by their keys in the file."""
    return {
        key: getattr(layer, param)
        for name, layer in layers.items()
        for param, key in layer_keys(name, type(layer)).items()
    }


def _copy(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for key, target in into.items():
        fill(target, tensors[key])


def _detached_copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU that shares no memory with another tensor."""
    return whole(tensor.detach()).cpu().clone(memory_format=torch.contiguous_format)
