"""The rules that find the named module groups of a model, in forward order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, cast, get_args

from torch import nn

from dynalora_optim._base.checks import whole_number
from dynalora_optim._base.torch_private import has_child, parameter_slots, plain_name
from dynalora_optim._base.wrappers import bare
from dynalora_optim.groups._blocks import find_blocks, in_lists
from dynalora_optim.groups._module_group import AdapterModule, GroupRole, ModuleGroup, Slot


@dataclass(frozen=True)
class Blocks:
    """Full-parameter training by blocks: each of the model's repeated blocks is a group.

    Args:
        block_size: How many consecutive blocks form one group; the last group of each list, such
            as that of an encoder, may have fewer.
        outside: The role of the modules outside the blocks, such as embeddings, the final norm and
            the head: ``"always_active"``, ``"frozen"``, or ``"allocated"`` (the allocator chooses
            them too). Modules that ``always_active=`` names are always active.

    Raises:
        ValueError: ``outside`` is not one of the three, or ``block_size`` is less than 1.
    """

    block_size: int = 1
    outside: GroupRole = "always_active"

    def __post_init__(self) -> None:
        whole_number("block_size", self.block_size, least=1, of="blocks")
        if self.outside not in get_args(GroupRole):
            raise ValueError(
                f"Blocks(outside={self.outside!r}): pass one of {', '.join(get_args(GroupRole))}."
            )

    def claims(self, model: nn.Module) -> Iterator[ModuleGroup]:
        """Yield the groups of ``model``, also those outside the blocks, in the model's order.

        Raises:
            ValueError: The model has no blocks, or holds one block several times.
        """
        blocks = find_blocks(model)
        if not blocks:
            raise ValueError(
                f"groups='blocks' found no repeated blocks in {type(model).__name__}: no "
                "ModuleList of two or more modules of one class. Pass groups=callable(name, "
                "module) -> group name or None."
            )
        home = {
            block.module: (found, position)
            for found in in_lists(blocks)
            for position, block in enumerate(found)
        }
        holders = {m for m in model.modules() if any(part in home for part in m.modules())}
        holders -= home.keys()
        for name, module in model.named_modules():
            if module in home:
                found, position = home[module]
                first = position // self.block_size * self.block_size
                last = min(first + self.block_size, len(found)) - 1
                group = found[first].name + (f"-{last}" if last > first else "")
                yield ModuleGroup(group, (module,), tuple(_slots(name, module)))
            elif module in holders:
                # The module contains the blocks, so that it is not a group as a whole. Each of its
                # own parameters, such as a position embedding, is one.
                for slot in _own_slots(name, module):
                    yield ModuleGroup(slot.name, (module,), (slot,), role=self.outside)
            elif _parent(model, name) in holders and (slots := tuple(_slots(name, module))):
                yield ModuleGroup(name, (module,), slots, role=self.outside)


GroupRule: TypeAlias = "Literal['auto', 'blocks'] | Blocks | Callable[[str, nn.Module], str | None]"


def find_groups(model: nn.Module, rule: GroupRule = "auto") -> list[ModuleGroup]:
    """Return the module groups of ``model`` in forward order (the order of its definition).

    Args:
        model: The adapted model.
        rule: ``"auto"`` takes every module with an ``adapter_params()`` method (`AdapterModule`)
            and every Hugging Face peft layer. `Blocks`, or ``"blocks"`` for its defaults, takes all
            parameters of the repeated blocks. A callable ``(name, module) -> group name or None``
            puts a module, with all parameters below it, into the group that it returns.

    Raises:
        TypeError: ``rule`` is not one of these, or returns something else.
        ValueError: No module forms a group.
    """
    model = bare(model)
    rule = Blocks() if rule == "blocks" else rule
    if isinstance(rule, Blocks):
        claims = list(rule.claims(model))
    elif rule == "auto":
        claims = [
            ModuleGroup(name, (module,), tuple(slots))
            for name, module in model.named_modules()
            if (slots := list(_adapter_slots(name, module)))
        ]
    elif callable(rule):
        claims = [
            ModuleGroup(group, (module,), tuple(slots))
            for name, module in model.named_modules()
            if (group := _named_by(rule, name, module)) is not None
            if (slots := list(_slots(name, module)))
        ]
    else:
        raise TypeError(
            f"groups={rule!r} is not a rule; pass 'auto', 'blocks', Blocks(...), or a callable "
            "(name, module) -> group name or None."
        )
    if not claims:
        raise ValueError(_no_groups(rule, model))
    return _joined(replace(claim, name=plain_name(claim.name)) for claim in claims)


def _named_by(
    rule: Callable[[str, nn.Module], str | None], name: str, module: nn.Module
) -> str | None:
    group = rule(name, module)
    if group is None or isinstance(group, str):
        return group
    raise TypeError(
        f"groups=callable returned {group!r} for the module {name!r}; it must return the name of a "
        "group (a str), or None for a module that forms no group."
    )


def _no_groups(rule: GroupRule, model: nn.Module) -> str:
    if rule == "auto":
        return (
            f"groups='auto' found no adapter in {type(model).__name__}: no module has "
            "adapter_params() and none is a Hugging Face peft layer. Call "
            "dynalora_adapters.inject(model, LoRAConfig(...)) or peft.get_peft_model first; or "
            "pass groups='blocks' to train the parameters of whole blocks, or "
            "groups=callable(name, module) -> group name or None."
        )
    return (
        f"groups={rule!r} named no module of {type(model).__name__} that has parameters; "
        "return a group name for at least one."
    )


def _slots(prefix: str, module: nn.Module) -> Iterator[Slot]:
    for path, owner in module.named_modules(prefix=prefix):
        yield from _own_slots(path, owner)


def _own_slots(path: str, owner: nn.Module) -> Iterator[Slot]:
    for attribute, parameter in parameter_slots(owner).items():
        if parameter is not None:
            yield Slot(owner, attribute, f"{path}.{attribute}" if path else attribute)


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _adapter_slots(name: str, module: nn.Module) -> Iterator[Slot]:
    """Yield the slots of an adapter layer; nothing for any other module."""
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
    return hasattr(module, "adapter_layer_names") and has_child(module, "base_layer")


def _joined(claims: Iterable[ModuleGroup]) -> list[ModuleGroup]:
    """Join the claims that have the same name or share a parameter (tied weights)."""
    families: dict[int, list[ModuleGroup]] = {}  # by the position of their first claim
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
    slots = {(id(s.owner), s.attribute): s for group in family for s in group.slots}
    modules = dict.fromkeys(module for group in family for module in group.modules)
    names = dict.fromkeys(group.name for group in family)
    roles = {group.role for group in family}
    return ModuleGroup(
        family[0].name,
        tuple(modules),
        tuple(slots.values()),
        aliases=tuple(names)[1:],
        role=roles.pop() if len(roles) == 1 else "allocated",
    )
