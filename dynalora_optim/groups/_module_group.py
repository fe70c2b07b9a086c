"""A module group: the unit that is active or inactive.

A group knows *where* its parameters live (owner module and attribute), never the parameter objects
themselves: FSDP2 and ``accelerator.prepare`` put new ones in their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from torch import nn

from dynalora_optim._base.torch_private import parameter_slots

GroupRole: TypeAlias = Literal["allocated", "always_active", "frozen"]


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
        parameter = parameter_slots(self.owner)[self.attribute]
        assert isinstance(parameter, nn.Parameter)
        return parameter


@dataclass(frozen=True)
class ModuleGroup:
    """A named set of modules whose adapter parameters get gradients together or not at all.

    Attributes:
        name: The dotted path of the module in the model, or what a user's rule returned.
        modules: One module; more where they share a parameter or a user's rule joins them.
        slots: The places of the group's parameters; a tied one has several.
        aliases: The names of groups that were joined with this one.
        role: Whether allocators choose it.
    """

    name: str
    modules: tuple[nn.Module, ...]
    slots: tuple[Slot, ...]
    aliases: tuple[str, ...] = ()
    role: GroupRole = "allocated"

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that stand in the slots now, each once."""
        return iter({id(p): p for p in (slot.parameter for slot in self.slots)}.values())
