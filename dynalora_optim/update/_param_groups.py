"""The user's param groups, split per module group, and the checks that make the split safe."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from dynalora_optim._base.torch_private import plain_name
from dynalora_optim.groups._module_group import ModuleGroup

ParamGroup: TypeAlias = "dict[str, Any]"
State: TypeAlias = "MutableMapping[Tensor, dict[str, Any]]"  # of an optimizer, by parameter

PACKED = "dynalora"  # a group's key for values saved in a state dict; "" in the optimizer
LINE = "user_group"  # a piece's key for the number of the param group that it is a piece of
OUTSIDE = "always_active"  # the name of a param group without a module group


class ParameterIndex:
    """The module group and the name of each parameter of a model."""

    def __init__(self, model: nn.Module, groups: Sequence[ModuleGroup]) -> None:
        self._model = model
        self._groups = groups
        self._names = {id(p): plain_name(name) for name, p in model.named_parameters()}
        self._owners = {id(p): group.name for group in groups for p in group.parameters()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_names": {}, "_owners": {}}  # a copy has other parameters

    def renewed(self) -> ParameterIndex:
        """Return an index of the parameters that are in the model now; FSDP2 replaces them."""
        return ParameterIndex(self._model, self._groups)

    def knows(self, parameters: Iterable[Tensor]) -> bool:
        """Return whether the model holds all ``parameters``."""
        return all(id(parameter) in self._names for parameter in parameters)

    def split(self, parameters: Sequence[Tensor]) -> dict[str, list[int]]:
        """Return the positions of ``parameters`` by module group, in forward order.

        Parameters outside all module groups come last, under the name `OUTSIDE`.
        """
        pieces: dict[str, list[int]] = {name: [] for name in [*self._order(), OUTSIDE]}
        for position, parameter in enumerate(parameters):
            pieces[self._owners.get(id(parameter), OUTSIDE)].append(position)
        return {name: positions for name, positions in pieces.items() if positions}

    def names_of(self, parameters: Iterable[Tensor]) -> list[str]:
        """Return the names of ``parameters`` in the model."""
        return [self._names[id(parameter)] for parameter in parameters]

    def groups_of(self, parameters: Iterable[Tensor]) -> list[ModuleGroup]:
        """Return the module groups that hold any of ``parameters``, in forward order."""
        names = {self._owners.get(id(parameter)) for parameter in parameters}
        return [group for group in self._groups if group.name in names]

    def check_belongs(self, parameters: Iterable[Tensor]) -> None:
        """Raise if a parameter is not in the model.

        Raises:
            ValueError: One is not; the message gives its position and shape.
        """
        strange = [
            f"#{i} of shape {tuple(parameter.shape)}"
            for i, parameter in enumerate(parameters)
            if id(parameter) not in self._names
        ]
        if strange:
            raise ValueError(
                f"optimizer holds {len(strange)} parameter(s) that are not in the model: "
                f"{_some(strange)}. Build the optimizer from the parameters of the model you pass, "
                "after adapters are injected and the model is on its device."
            )

    def check_groups(
        self, parameters: Sequence[Tensor], named: Collection[str] = ()
    ) -> list[ModuleGroup]:
        """Return the groups that wait, because requires_grad is False for all their parameters.

        An optimizer that holds only ``parameters`` must be able to train every other module group.
        If there is none, it must train something else meanwhile. Groups that are not allocated may
        be missing, unless ``named`` contains them.

        Raises:
            ValueError: Some groups cannot be trained; the message names them.
        """
        held = {id(parameter) for parameter in parameters}
        groups = [g for g in self._groups if g.role == "allocated" or g.name in named]
        frozen = [group for group in groups if group.is_frozen]
        waiting = [g for g in frozen if g.name not in named]
        trains = any(p.requires_grad for p in parameters)  # a head alone, at first
        if all(g in waiting or g.name in named for g in groups) and not (waiting and trains):
            raise ValueError(_all_frozen([g.name for g in waiting]))
        if stuck := [g.name for g in frozen if g.name in named]:
            raise ValueError(
                f"always_active= names {len(stuck)} module group(s) of which requires_grad is "
                f"False for every parameter: {_some(stuck)}. They would never be trained. Set it "
                "to True, or leave them out of always_active."
            )
        needed = [g for g in groups if g not in waiting]
        if missing := [g.name for g in needed if held.isdisjoint(map(id, g.parameters()))]:
            raise ValueError(
                f"optimizer holds no parameter of {len(missing)} module group(s): "
                f"{_some(missing)}. They would never be trained. Build the optimizer from all "
                "adapter parameters, frozen or not (model.parameters() will do), after "
                "injecting; to leave modules out, pass groups=callable."
            )
        return waiting

    def _order(self) -> list[str]:
        return [group.name for group in self._groups]


def flatten(groups: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    """Return the parameters of all groups, in order."""
    return [parameter for group in groups for parameter in group["params"]]


def parameters_of(param_group: Mapping[str, Any]) -> list[Tensor]:
    """Return the parameters of a group given as torch allows: one, many, or (name, parameter)."""
    params = param_group["params"]
    if isinstance(params, Tensor):
        return [params]
    return [item[1] if isinstance(item, tuple) else item for item in params]


def match_always_active(patterns: Sequence[str], groups: Sequence[ModuleGroup]) -> set[str]:
    """Return the names of the groups that match a pattern (exact names or shell-style ``*``).

    Raises:
        TypeError: ``patterns`` is a single string.
        ValueError: A pattern matches no group, or all patterns leave no group to allocate.
    """
    if isinstance(patterns, str):
        raise TypeError(f"always_active={patterns!r} is one string; pass a sequence, e.g. a list.")
    names = [group.name for group in groups]
    matched: set[str] = set()
    for pattern in patterns:
        hits = [g.name for g in groups if fnmatch.filter([g.name, *g.aliases], pattern)]
        if not hits:
            raise ValueError(
                f"always_active={pattern!r} matches none of the {len(names)} module groups; pass "
                f"a name or a pattern with *, such as {names[-1]!r}."
            )
        matched.update(hits)
    if not any(group.role == "allocated" and group.name not in matched for group in groups):
        raise ValueError(
            f"always_active={list(patterns)!r} matches all {len(names)} module groups and leaves "
            "none to allocate; use the wrapped optimizer as it is."
        )
    return matched


def _all_frozen(names: Sequence[str]) -> str:
    return (
        f"requires_grad is False for every parameter of all {len(names)} module groups: "
        f"{_some(names)}, and the optimizer holds nothing else that trains. Set requires_grad to "
        "True for one of them first, and build the optimizer with its parameters; others may be "
        "frozen, and join when you unfreeze them. If peft set it to False because another adapter "
        "is in use, call model.set_adapter(name) first."
    )


def _some(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"
