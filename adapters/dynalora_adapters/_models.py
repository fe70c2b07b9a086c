"""The parts of a model: its modules by name, its adapters, and the owners of parameters."""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dynalora_adapters._layers import AdapterLinear
from dynalora_adapters._sharded import check_not_fsdp1
from dynalora_adapters._torch_private import children, original, plain_name


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        inner = original(model)
        if inner is None and isinstance(model, (DistributedDataParallel, DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def module_tree(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module below the model by dotted name, parents first.

    A module that has several names appears under each. Modules inside an adapter do not appear, so
    that a model has the same names with and without adapters.
    """
    tree: dict[str, nn.Module] = {}
    adapters: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        name = plain_name(path)
        if not name or inside(name, adapters):
            continue
        tree[name] = module
        if isinstance(module, AdapterLinear):
            adapters.add(name)
    return tree


def first_names(tree: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Keep only the first name of each module."""
    first: dict[nn.Module, str] = {}
    for name, module in tree.items():
        first.setdefault(module, name)
    return {name: module for module, name in first.items()}


def adapters_of(model: nn.Module) -> dict[str, AdapterLinear]:
    """Return the model's adapters, each under its first name."""
    modules = first_names(module_tree(model))
    return {name: module for name, module in modules.items() if isinstance(module, AdapterLinear)}


def require_adapters(model: nn.Module) -> dict[str, AdapterLinear]:
    """Return the model's adapters, or raise ValueError if there is none."""
    check_not_fsdp1(model)
    adapters = adapters_of(model)
    if not adapters:
        raise ValueError(
            f"model ({type(model).__name__}) holds no adapters; call inject(model, config) first."
        )
    return adapters


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """Return, for the id of every parameter, its names: one for each place of each owner."""
    owners: dict[int, list[str]] = {}
    for module, names in {model: [""], **places(model)}.items():
        for prefix in names:
            for name, param in module.named_parameters(prefix, recurse=False):
                owners.setdefault(id(param), []).append(plain_name(name))
    return owners


def places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return, for every module, a name for each attribute that holds it.

    Most modules have one. A module that two parents hold has two, and peft replaces the first only.
    A parent that is held twice counts once: what is replaced inside it is replaced everywhere.
    """
    found: dict[nn.Module, list[str]] = {}
    for path, parent in model.named_modules():
        for name, child in children(parent):
            found.setdefault(child, []).append(plain_name(f"{path}.{name}" if path else name))
    return found


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Replace ``module`` by ``new[module]`` wherever the model holds it."""
    for parent in list(model.modules()):
        for name, child in children(parent):
            if child in new and new[child] is not parent:
                setattr(parent, name, new[child])


def inside(name: str, names: Container[str]) -> bool:
    """Whether ``name`` is one of ``names``, or the name of a module inside one of them."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in names for end in range(1, len(parts) + 1))
