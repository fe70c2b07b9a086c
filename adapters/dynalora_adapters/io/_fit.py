"""Whether the tensors of a file fit a model. Nothing here changes the model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from dynalora_adapters._config import AdapterConfig
from dynalora_adapters._sharded import check_numbers
from dynalora_adapters.io._embeddings import check_tied
from dynalora_adapters.io._peft_format import PREFIX, layer_shapes
from dynalora_adapters.io._peft_kinds import IF_BY_PEFT
from dynalora_adapters.io._peft_shared import shared_shapes
from dynalora_adapters.io._storage import CONFIG_NAME, WEIGHTS_NAME

# With bias="all", peft also writes the biases of the copies from which it trains modules_to_save.
_SPARE_BIAS = re.compile(r"\.(original_module|modules_to_save)\.(.*\.)?bias$")


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


def check_fit(
    tree: Mapping[str, nn.Module],
    names: Collection[str],
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    *,
    heads: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Raise unless the file has exactly the expected tensors, in fitting shapes and dtypes.

    Args:
        tree: The modules of the model.
        names: Those that are adapted.
        config: What the file says about them.
        tensors: The tensors of the file.
        heads: The tensors of the model that the file sets as a whole.
        folder: Where the file is.
    """
    path = folder / WEIGHTS_NAME
    check_numbers(heads)
    shapes = _shapes(tree, names, config, tensors, folder)
    wanted = {**shapes, **{key: tuple(tensor.shape) for key, tensor in heads.items()}}
    if foreign := [key for key in tensors if key not in wanted and not key.startswith(PREFIX)]:
        raise ValueError(
            f"{path} holds names without the prefix {PREFIX!r}, which peft would ignore silently: "
            f"{_few(foreign)}; rename them, or save the adapter again."
        )
    missing, unexpected = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if config.bias == "all":
        unexpected = {key for key in unexpected if not _SPARE_BIAS.search(key)}
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit the model: missing {_few(missing)}; unexpected "
            f"{_few(unexpected)}; load it into a model like the one it was trained with. "
            f"{IF_BY_PEFT}"
        )
    for key, shape in wanted.items():
        _check_tensor(path, key, tensors[key], shape, heads.get(key))
    check_tied(tensors, heads, path)


def _check_tensor(
    path: Path, key: str, tensor: Tensor, shape: tuple[int, ...], head: Tensor | None
) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{path}: {key} has the shape {tuple(tensor.shape)}, but the model and the rank in "
            f"{CONFIG_NAME} need {shape}; if the vocabulary was resized in training, call "
            f"model.resize_token_embeddings first."
        )
    if tensor.is_floating_point() is not (head is None or head.is_floating_point()):
        raise ValueError(
            f"{path}: {key} is {tensor.dtype}, but the model needs "
            f"{'a floating dtype' if head is None else head.dtype}."
        )


def _few(keys: Collection[str]) -> str:
    first = ", ".join(sorted(keys)[:3])
    return f"{first} and {len(keys) - 3} more" if len(keys) > 3 else first or "nothing"
