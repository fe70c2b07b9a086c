"""Save and load an adapter, in the file format of peft."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dynalora_adapters._config import AdapterConfig
from dynalora_adapters._inject import check_bare, injection_of, install
from dynalora_adapters._layers import AdapterLinear
from dynalora_adapters._models import adapters_of, module_tree, require_adapters, unwrap
from dynalora_adapters._targets import make_plan
from dynalora_adapters.io._peft_format import (
    PREFIX,
    decode_config,
    encode_config,
    head_tensors,
    known_names,
    layer_keys,
    layer_shapes,
)
from dynalora_adapters.io._peft_shared import as_saved, share, shared_shapes, shared_tensors
from dynalora_adapters.io._storage import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    read_adapter,
    write_adapter,
)


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters and the trainable modules of ``model`` into the folder ``path``.

    The files ``adapter_model.safetensors`` and ``adapter_config.json`` have peft's format:
    ``peft.PeftModel.from_pretrained(base_model, path)`` loads them. Inactive adapters are saved
    like active ones, and merged adapters like those that are not merged. The folder is created if
    it does not exist. If writing fails, older files in it are not damaged.

    Args:
        model: A model adapted by ``inject`` or ``load_adapter``. It may be wrapped in
            DistributedDataParallel or by ``torch.compile``.
        path: The folder.

    Raises:
        ValueError: If the model has no adapters.
        OSError: If the files cannot be written.
    """
    model = unwrap(model)
    layers = require_adapters(model)
    config = as_saved(injection_of(model).config, layers)
    tree = module_tree(model)
    own = {**_layer_tensors(layers), **shared_tensors(config, layers)}
    tensors = {**own, **head_tensors(tree, config.trainable)}
    dense = {key: _detached_copy(tensor) for key, tensor in tensors.items()}
    write_adapter(Path(path), encode_config(model, tree, config), dense)


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load an adapter that ``save_adapter`` or peft's ``save_pretrained`` wrote, in place.

    A model without adapters gets the adapters that the file describes. If the model has adapters
    already, only the weights are loaded; layers, ranks and scalings must agree, and for VeRA the
    key. Dropout may differ. Everything is checked before the model is changed. No code in the files
    is executed. Tensors are converted to the dtype and device of the parameters. VeRA's shared
    matrices are taken from the file or, if it does not contain them, drawn from its key.

    Args:
        model: A model without adapters, or one adapted by this package.
        path: The folder with ``adapter_model.safetensors`` and ``adapter_config.json``.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: If one of the two files is missing.
        ValueError: If a file is damaged, uses an option that is not implemented here, or does not
            fit the model.
    """
    folder = Path(path)
    try:
        _load(model, folder)
    except RecursionError as error:  # before any change: the configuration is read first
        raise ValueError(f"{folder / CONFIG_NAME} is nested too deeply ({error}).") from error
    return model


def _load(model: nn.Module, folder: Path) -> None:
    raw, tensors = read_adapter(folder)
    try:
        config = decode_config(raw)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    if layers := adapters_of(unwrap(model)):
        _load_into_adapters(unwrap(model), layers, config, tensors, folder)
    else:
        _load_into_bare(model, config, tensors, folder)


def _load_into_bare(
    model: nn.Module, config: AdapterConfig, tensors: Mapping[str, Tensor], folder: Path
) -> None:
    check_bare(model)
    tree = module_tree(model)
    try:
        config = known_names(config, tree)
        plan = make_plan(model, config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME} does not fit the model: {error}") from error
    heads = head_tensors(tree, config.trainable)
    _check_tensors(tensors, _shapes(tree, plan.bases, config, tensors, folder), heads, folder)
    with torch.random.fork_rng(devices=[]):  # what the layers draw is overwritten below
        layers = config.build(plan.bases)
    share(config, layers, tensors)
    _copy(tensors, {**_layer_tensors(layers), **heads})
    install(model, config, plan, layers)


def _load_into_adapters(
    model: nn.Module,
    layers: Mapping[str, AdapterLinear],
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    folder: Path,
) -> None:
    tree = module_tree(model)
    heads = head_tensors(tree, injection_of(model).config.trainable)
    for name, layer in layers.items():
        _check_kind(name, layer, config, folder)
    _check_tensors(tensors, _shapes(tree, layers, config, tensors, folder), heads, folder)
    for name, layer in layers.items():
        _check_agrees(name, layer, config, folder)
    share(config, layers, tensors)
    _copy(tensors, {**_layer_tensors(layers), **heads})


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


def _shapes(
    tree: Mapping[str, nn.Module],
    names: Collection[str],
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    folder: Path,
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the adapters' tensors, and of the shared ones if the file has them."""
    try:
        shared = shared_shapes(tree, names, config, tensors)
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS_NAME}: {error}") from error
    return {**layer_shapes(tree, names, config), **shared}


def _check_tensors(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    heads: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Raise unless the file has exactly the expected tensors, in fitting shapes and dtypes."""
    path = folder / WEIGHTS_NAME
    wanted = {**shapes, **{key: tuple(tensor.shape) for key, tensor in heads.items()}}
    if foreign := [key for key in tensors if key not in wanted and not key.startswith(PREFIX)]:
        raise ValueError(
            f"{path} holds names without the prefix {PREFIX!r}, which peft would ignore silently: "
            f"{_few(foreign)}; rename them, or save the adapter again."
        )
    missing, unexpected = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit the model: missing {_few(missing)}; unexpected "
            f"{_few(unexpected)}; load it into a model like the one it was trained with."
        )
    for key, shape in wanted.items():
        _check_tensor(path, key, tensors[key], shape, heads.get(key))


def _check_tensor(
    path: Path, key: str, tensor: Tensor, shape: tuple[int, ...], head: Tensor | None
) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{path}: {key} has the shape {tuple(tensor.shape)}, but the model and the rank in "
            f"{CONFIG_NAME} need {shape}."
        )
    if tensor.is_floating_point() is not (head is None or head.is_floating_point()):
        raise ValueError(
            f"{path}: {key} is {tensor.dtype}, but the model needs "
            f"{'a floating dtype' if head is None else head.dtype}."
        )


def _few(keys: Collection[str]) -> str:
    first = ", ".join(sorted(keys)[:3])
    return f"{first} and {len(keys) - 3} more" if len(keys) > 3 else first or "nothing"


def _layer_tensors(layers: Mapping[str, AdapterLinear]) -> dict[str, Tensor]:
    """Return the parameters of the adapters, by their keys in the file."""
    return {
        key: getattr(layer, param)
        for name, layer in layers.items()
        for param, key in layer_keys(name, type(layer)).items()
    }


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for key, target in into.items():
        target.copy_(tensors[key])


def _detached_copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU that shares no memory with another tensor."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
