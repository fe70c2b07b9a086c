"""Where peft 0.21 computes something else with a file of ours, or refuses it, and vice versa."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from dynalora_adapters._bases import is_conv1d
from dynalora_adapters._config import Names
from dynalora_adapters._layers import AdapterLinear
from dynalora_adapters._models import inside, places
from dynalora_adapters._notices import few
from dynalora_adapters._targets import ends, head_names
from dynalora_adapters._tasks import input_embeddings
from dynalora_adapters.io._peft_kinds import WITH_PEFT
from dynalora_adapters.io._peft_renames import renamed, taken_for_experts

# What peft refuses in models of these types (peft/tuners/tuners_utils.py).
_MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_MAMBA_NAMES = {"out_proj", "conv1d"}
# Libraries of quantised layers for which peft has layers of its own.
_QUANTISED = ("bitsandbytes", "torchao", "auto_gptq", "gptqmodel", "awq", "hqq", "aqlm", "eetq")


def unreadable(
    model: nn.Module,
    tree: Mapping[str, nn.Module],
    layers: Mapping[str, AdapterLinear],
    trainable: Names,
) -> Iterator[str]:
    """Yield a line for each kind of adapted module that peft would not read back as it is."""
    ending = "Load the file with load_adapter of this package."
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if taken := taken_for_experts(kind, tree, layers):
        yield (
            f"peft would leave out the adapters of {few(taken)}: in a model with fused experts it "
            f"takes their names for those of the experts. {ending} Or train without them: "
            f"exclude={ends(taken)!r}."
        )
    if lost := renamed(model, layers):
        yield (
            f"peft would leave out the adapters of {few(lost)}: it takes their names for those of "
            f"an older version of the model. {ending} Or train without them: "
            f"exclude={ends(lost)!r}."
        )
    if refused := [n for n in layers if ends([n])[0] in _MAMBA_NAMES and kind in _MAMBA_TYPES]:
        yield (
            f"peft refuses {few(refused)} in models of the type {kind!r}. {ending} Or train "
            f"without them: exclude={ends(refused)!r}."
        )
    if foreign := [n for n, layer in layers.items() if not _known(layer.base_layer)]:
        yield (
            f"peft refuses {few(foreign)}, of the class "
            f"{type(layers[foreign[0]].base_layer).__name__}. {ending}"
        )
    if _cannot_be_asked(model):
        yield (
            f"peft refuses {type(model).__name__}, whose get_input_embeddings is not implemented: "
            f"it asks for it because the model can tie weights. {ending}"
        )
    yield from _saved_twice(tree, trainable, ending)
    yield from _held_twice(model, layers)


def _saved_twice(tree: Mapping[str, nn.Module], trainable: Names, ending: str) -> Iterator[str]:
    if nested := _nested(tree, trainable):
        yield (
            f"peft refuses trainable={list(trainable)!r}, because it also matches {few(nested)}, "
            f"inside of another match. {ending} Or rename one of them."
        )


def _nested(tree: Mapping[str, nn.Module], trainable: Names) -> list[str]:
    """Return the modules to save that are inside another one. peft makes a copy of each."""
    heads = head_names(tree, trainable)
    return sorted(name for name in heads if inside(name.rpartition(".")[0], heads))


def _cannot_be_asked(model: nn.Module) -> bool:
    """Whether peft asks for the input embeddings, and the model does not tell them."""
    ties = getattr(getattr(model, "config", None), "tie_word_embeddings", True) is not False
    asked = ties and isinstance(getattr(model, "_tied_weights_keys", None), dict)
    return asked and input_embeddings(model) is None


def _held_twice(model: nn.Module, layers: Mapping[str, AdapterLinear]) -> Iterator[str]:
    held = places(model)
    for name, layer in layers.items():
        if len(held[layer]) > 1:
            yield (
                f"{' and '.join(held[layer])} are one module, which has one adapter here. peft "
                f"adapts the first only. Load the file with load_adapter of this package, or train "
                f"without it: exclude={[name]!r}."
            )


def misread(
    model: nn.Module,
    tree: Mapping[str, nn.Module],
    raw: Mapping[str, Any],
    bases: Mapping[str, nn.Module],
    trainable: Names,
) -> str | None:
    """Return why a file is not what we would read, if peft has written it; None if it is.

    peft adapts one of several places of a module only. Of a module to save that is inside another
    one, it saves another copy than it has trained.
    """
    if "peft_version" not in raw and "auto_mapping" not in raw:
        return None
    if nested := _nested(tree, trainable):
        return (
            f"modules_to_save={list(trainable)!r} matches {few(nested)}, inside of another match: "
            f"peft has saved another copy of it than it has trained; train again with other names."
        )
    held = places(model)
    if twice := [" and ".join(held[base]) for base in bases.values() if len(held[base]) > 1]:
        return (
            f"{'; '.join(twice[:3])} are one module of the model. peft, which wrote the file, "
            f"adapts its first place only; {WITH_PEFT}."
        )
    return None


def _known(base: nn.Module) -> bool:
    """Whether peft has a layer for this class of base module."""
    if isinstance(base, (nn.Linear, nn.Embedding)) or is_conv1d(base):
        return True
    return type(base).__module__.partition(".")[0] in _QUANTISED
