"""A module group: modules that are active or inactive together.

A group stores *where* its parameters are (owner module and attribute), not the parameter objects:
FSDP2 and ``accelerator.prepare`` replace these objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

from dynalora_optim._base.torch_private import parameter_slots

GroupRole: TypeAlias = Literal["allocated", "always_active", "frozen"]


@runtime_checkable
class AdapterModule(Protocol):
    """What an adapter layer must have so that ``groups="auto"`` recognises it.

    If the layer also has a boolean attribute ``active`` and uses detached parameters while that is
    False, the optimizer sets this flag. Any other layer is made inactive by hooks.
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
        """The parameter that is in this place now."""
        parameter = self.tensor
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def tensor(self) -> Tensor | None:
        """What is in this place now: a parameter, or a tensor that replaces it for a forward."""
        # By dict: a recomputation reads an idle module's parameters detached.
        return dict.__getitem__(parameter_slots(self.owner), self.attribute)

    def put(self, tensor: Tensor | None) -> None:
        """Put a parameter into this place, or a tensor that replaces it for a forward."""
        # setattr accepts only a Parameter.
        parameter_slots(self.owner)[self.attribute] = tensor  # type: ignore[assignment]


@dataclass(frozen=True)
class ModuleGroup:
    """A named set of modules whose adapter parameters get gradients together or not at all.

    Attributes:
        name: The dotted path of the module in the model, or what a user's rule returned.
        modules: One module, or several if they share a parameter or a user's rule joins them.
        slots: The places of the group's parameters; a tied parameter has several.
        aliases: The names of groups that were joined with this one.
        role: Whether allocators choose when the group trains, or it always or never trains.
    """

    name: str
    modules: tuple[nn.Module, ...]
    slots: tuple[Slot, ...]
    aliases: tuple[str, ...] = ()
    role: GroupRole = "allocated"

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that are in the slots now, each once."""
        return iter({id(p): p for p in (slot.parameter for slot in self.slots)}.values())
