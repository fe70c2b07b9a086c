"""From a model to its ordered, named module groups: the units that are active or inactive.

A group knows *where* its parameters live (owner module and attribute), never the parameter objects
themselves: FSDP2 and ``accelerator.prepare`` put new ones in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, cast, runtime_checkable

from torch import nn

GroupRule: TypeAlias = "Literal['auto'] | Callable[[str, nn.Module], str | None]"


@runtime_checkable
class AdapterModule(Protocol):
    """What an adapter layer has for ``groups="auto"`` to recognise it.

    If it also carries a boolean attribute ``active`` and uses detached parameters while that is
    False, the optimizer sets the flag; any other module is made inactive from outside.
    """

    def adapter_params(self) -> list[str]:
        """Return the names of the adapter's parameters, relative to the module."""
        ...


@dataclass(frozen=True)
class Slot:
    """The place of one parameter: ``getattr(owner, attribute)``; ``name`` is its dotted path."""

    owner: nn.Module
    attribute: str
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that stands there now."""
        parameter = self.owner._parameters[self.attribute]
        assert isinstance(parameter, nn.Parameter)
        return parameter


@dataclass(frozen=True)
class ModuleGroup:
    """A named set of modules whose adapter parameters get gradients together or not at all.

    Attributes:
        name: The dotted path of the module in the model, or what a user's rule returned.
        modules: One module; more where they share a parameter or a user's rule joins them.
        slots: The places of the group's parameters.
    """

    name: str
    modules: tuple[nn.Module, ...]
    slots: tuple[Slot, ...]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that stand in the slots now."""
        return (slot.parameter for slot in self.slots)


def find_groups(model: nn.Module, rule: GroupRule = "auto") -> list[ModuleGroup]:
    """Return the module groups of ``model`` in forward order (the order of its definition).

    Args:
        model: The adapted model.
        rule: ``"auto"`` takes every module with an ``adapter_params()`` method (`AdapterModule`)
            and every Hugging Face peft layer. A callable ``(name, module) -> group name or None``
            makes each module that it names, with all parameters below it, part of that group.

    Raises:
        TypeError: ``rule`` is neither.
        ValueError: No module forms a group.
    """
    if rule == "auto":
        claims = [
            ModuleGroup(name, (module,), tuple(slots))
            for name, module in model.named_modules()
            if (slots := list(_adapter_slots(name, module)))
        ]
    elif callable(rule):
        claims = [
            ModuleGroup(group, (module,), tuple(slots))
            for name, module in model.named_modules()
            if (group := rule(name, module)) is not None
            if (slots := list(_slots(name, module)))
        ]
    else:
        raise TypeError(
            f"groups={rule!r} is not a rule; pass 'auto', or a callable "
            "(name, module) -> group name or None."
        )
    if not claims:
        raise ValueError(_no_groups(rule, model))
    return _joined(claims)


def _no_groups(rule: GroupRule, model: nn.Module) -> str:
    if rule == "auto":
        return (
            f"groups='auto' found no adapter in {type(model).__name__}: no module has "
            "adapter_params() and none is a Hugging Face peft layer. Call "
            "dynalora_adapters.inject(model, LoRAConfig(...)) or peft.get_peft_model first, or "
            "pass groups=callable(name, module) -> group name or None."
        )
    return (
        f"groups={rule!r} named no module of {type(model).__name__} that has parameters; "
        "return a group name for at least one."
    )


def _slots(prefix: str, module: nn.Module) -> Iterator[Slot]:
    for path, owner in module.named_modules(prefix=prefix):
        for attribute, parameter in owner._parameters.items():
            if parameter is not None:
                yield Slot(owner, attribute, f"{path}.{attribute}" if path else attribute)


def _adapter_slots(name: str, module: nn.Module) -> Iterator[Slot]:
    """The slots of an adapter layer; none for any other module."""
    if isinstance(module, AdapterModule):
        roots = tuple(module.adapter_params())
    elif _is_peft_layer(module):
        roots = tuple(cast(Iterable[str], module.adapter_layer_names))
    else:
        return
    start = len(name) + 1 if name else 0
    for slot in _slots(name, module):
        relative = slot.name[start:]
        if any(relative == root or relative.startswith(f"{root}.") for root in roots):
            yield slot


def _is_peft_layer(module: nn.Module) -> bool:
    # peft's wrapper for modules_to_save has adapter_layer_names too, but no base_layer: it holds
    # whole modules that always train, not an adapter.
    return hasattr(module, "adapter_layer_names") and "base_layer" in module._modules


def _joined(claims: Iterable[ModuleGroup]) -> list[ModuleGroup]:
    """Join the claims that have the same name or share a parameter (tied weights)."""
    families: dict[int, list[ModuleGroup]] = {}  # by the number of their first claim
    home: dict[str | int, int] = {}  # the family of each name and each parameter
    for number, claim in enumerate(claims):
        kin = sorted({home[mark] for mark in _marks(claim) if mark in home})
        root = kin[0] if kin else number
        families[root] = [group for k in kin for group in families.pop(k)] + [claim]
        home.update((mark, root) for group in families[root] for mark in _marks(group))
    return [_union(family) for _, family in sorted(families.items())]


def _marks(group: ModuleGroup) -> list[str | int]:
    return [group.name, *map(id, group.parameters())]


def _union(family: Sequence[ModuleGroup]) -> ModuleGroup:
    slots: dict[int, Slot] = {}
    for slot in (slot for group in family for slot in group.slots):
        slots.setdefault(id(slot.parameter), slot)
    modules = dict.fromkeys(module for group in family for module in group.modules)
    return ModuleGroup(family[0].name, tuple(modules), tuple(slots.values()))
