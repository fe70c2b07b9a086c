"""Find the modules that a configuration selects. Nothing here changes a model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from dynalora_adapters._bases import linear_shape
from dynalora_adapters._config import AdapterConfig, Names
from dynalora_adapters._models import (
    first_names,
    inside,
    module_tree,
    parameter_owners,
)
from dynalora_adapters._reads import read_layers
from dynalora_adapters._tasks import is_plain_linear, output_head
from dynalora_adapters._torch_private import plain_name

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Plan:
    """What an injection will do.

    Attributes:
        bases: The modules to adapt, each under its first name, parents first.
        trainable: The modules of which all parameters stay trainable.
    """

    bases: dict[str, nn.Module]
    trainable: list[nn.Module]


def matches(names: Names, name: str) -> bool:
    """Whether a regular expression, or an entry of a list, matches a module's dotted name."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in names)


def is_all_linear(names: Names) -> bool:
    """Whether ``names`` is ``"all-linear"``."""
    return isinstance(names, str) and names.lower() == ALL_LINEAR


def head_names(tree: Iterable[str], trainable: Names) -> set[str]:
    """Return the modules that peft's loader treats as one of ``trainable``.

    It compares the ends of names as plain text: ``pre_classifier`` matches ``classifier``. So such
    modules must not be adapted, and their weights must be in the file.
    """
    return {name for name in tree if name.endswith(tuple(trainable))}


def make_plan(model: nn.Module, config: AdapterConfig) -> Plan:
    """Find the modules of a model without adapters that a configuration selects.

    Raises:
        ValueError: If an entry of ``targets``, ``exclude`` or ``trainable`` matches no module, or
            only modules that cannot be adapted, or if a trainable weight is shared.
    """
    tree = module_tree(model)
    _check_known("exclude", config.exclude, tree)
    _check_known("trainable", config.trainable, tree)
    _check_not_shared(model, config, tree)
    left_out = _left_out(tree, config)
    read = read_layers(model)
    if is_all_linear(config.targets):
        chosen = _all_linear(model, tree) - left_out - read.keys()
    else:
        found = [_resolve(rule, tree, config) - left_out for rule in _rules(config.targets)]
        chosen = set().union(*found)
        _check_called(tree, {m for m in chosen if not read.get(m, True)})
    if not chosen:
        raise ValueError(
            f"targets={config.targets!r} leaves no module to adapt: every match is an output head, "
            f"is in exclude={config.exclude!r} or is inside trainable={config.trainable!r}; "
            f"exclude fewer modules, or name other targets."
        )
    return Plan(
        bases=_outermost({n: m for n, m in first_names(tree).items() if m in chosen}),
        trainable=[m for n, m in first_names(tree).items() if matches(config.trainable, n)],
    )


def bias_tensors(
    model: nn.Module, config: AdapterConfig, adapted: Container[str]
) -> dict[str, nn.Parameter]:
    """Return the biases that ``config.bias`` keeps trainable, by their names in the adapted model.

    Args:
        model: The model, before or after its layers are adapted.
        config: What is asked for.
        adapted: The names of the layers that are adapted.
    """
    found: dict[str, nn.Parameter] = {}
    for path, param in model.named_parameters(remove_duplicate=False):
        owner, _, last = plain_name(path).rpartition(".")
        name = owner.removesuffix(".base_layer")
        if last == "bias" and config.bias != "none" and (config.bias == "all" or name in adapted):
            found[f"{name}.base_layer.bias" if name in adapted else plain_name(path)] = param
    return found


def _rules(names: Names) -> list[Names]:
    """Split a list into its entries. Each of them must match some module."""
    if isinstance(names, str):
        return [names] if names else []
    return [(entry,) for entry in names]


def _left_out(tree: Mapping[str, nn.Module], config: AdapterConfig) -> set[nn.Module]:
    """Return the modules that must not be adapted because of ``exclude`` or ``trainable``."""
    heads = head_names(tree, config.trainable)
    return {m for n, m in tree.items() if matches(config.exclude, n) or inside(n, heads)}


def _all_linear(model: nn.Module, tree: Mapping[str, nn.Module]) -> set[nn.Module]:
    head = output_head(model)
    inner = set(head.modules()) if head is not None else set()
    linear = {module for module in tree.values() if is_plain_linear(module)}
    return linear - inner


def _outermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Drop modules that are inside another one of these modules."""
    return {
        name: module
        for name, module in modules.items()
        if "." not in name or not inside(name.rpartition(".")[0], modules)
    }


def _resolve(rule: Names, tree: Mapping[str, nn.Module], config: AdapterConfig) -> set[nn.Module]:
    """Return the layers that one entry of ``targets`` selects and that can be adapted."""
    found = {name: module for name, module in tree.items() if matches(rule, name)}
    if not found:
        _check_no_parameter(rule, tree)
        raise _unknown("targets", rule, tree)
    fitting = {module for module in found.values() if config.class_for(module) is not None}
    if not fitting:
        kinds = sorted({type(module).__name__ for module in found.values()})
        raise ValueError(
            f"targets entry {_show(rule)} matches only modules that are not linear layers "
            f"({', '.join(kinds)}); name linear layers, such as {_linear_leaves(tree)}."
        )
    return fitting


def _check_no_parameter(rule: Names, tree: Mapping[str, nn.Module]) -> None:
    """Raise if an entry of ``targets`` names a parameter, as that of fused experts."""
    for name, module in tree.items():
        for leaf, _ in module.named_parameters(recurse=False):
            if linear_shape(module) is None and matches(rule, f"{name}.{leaf}"):
                raise ValueError(
                    f"targets entry {_show(rule)} matches the parameter {name}.{leaf}, not a "
                    f"module. To adapt it, use peft.LoraConfig(target_parameters=[{leaf!r}], ...) "
                    f"instead of inject: the optimizer drives peft's layers with the same line."
                )


def _check_called(tree: Mapping[str, nn.Module], dead: set[nn.Module]) -> None:
    """Raise if a layer that is read but never called would be adapted."""
    names = [name for name, module in tree.items() if module in dead]
    if names:
        parent = tree.get(names[0].rpartition(".")[0])
        raise ValueError(
            f"targets matches {', '.join(names[:3])}, whose weight "
            f"{'the model' if parent is None else type(parent).__name__} reads without calling "
            f"the layer: an adapter there would have no effect; leave it out with "
            f"exclude={ends(names)!r}."
        )


def ends(names: Iterable[str]) -> list[str]:
    """Return the last parts of dotted names, each once."""
    return sorted({name.rpartition(".")[2] for name in names})


def _check_known(option: str, names: Names, tree: Mapping[str, nn.Module]) -> None:
    for rule in _rules(names):
        if not any(matches(rule, name) for name in tree):
            raise _unknown(option, rule, tree)


def _check_not_shared(
    model: nn.Module, config: AdapterConfig, tree: Mapping[str, nn.Module]
) -> None:
    """Raise if a trainable weight belongs to a frozen module as well."""
    whole = {name for name in tree if matches(config.trainable, name)}
    for names in parameter_owners(model).values():
        free = [n for n in names if inside(n.rpartition(".")[0], whole)]
        frozen = sorted(set(names) - set(free))
        if free and frozen:
            raise ValueError(
                f"trainable includes {free[0]}, which is the same parameter as {frozen[0]} of a "
                f"frozen module; name both modules in trainable, or untie them."
            )


def _unknown(option: str, rule: Names, tree: Mapping[str, nn.Module]) -> ValueError:
    leaves = sorted({name.rpartition(".")[2] for name in tree})
    text = rule if isinstance(rule, str) else rule[0]
    near = difflib.get_close_matches(text.rpartition(".")[2], leaves, n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    if isinstance(rule, str):
        hint += f" A string is a regular expression for the whole dotted name; [{rule!r}] matches "
        hint += "names by their end."
    return ValueError(
        f"{option} entry {_show(rule)} matches no module of the model.{hint} "
        f"The names of linear layers end in {_linear_leaves(tree)}."
    )


def _show(rule: Names) -> str:
    return repr(rule if isinstance(rule, str) else rule[0])


def _linear_leaves(tree: Mapping[str, nn.Module]) -> str:
    shapes = {name: linear_shape(module) for name, module in tree.items()}
    leaves = ends(name for name, shape in shapes.items() if shape and not shape.lookup)
    return ", ".join(leaves[:12]) or "(it has no linear layer)"
