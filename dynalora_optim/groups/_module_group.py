"""A module group: modules that are active or inactive together.

A group stores *where* its parameters are (owner module and attribute), not the parameter objects:
FSDP2 and ``accelerator.prepare`` replace these objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NoReturn, Protocol, TypeAlias, runtime_checkable

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
        """The parameter that is in this place now.

        Raises:
            RuntimeError: Something else is in this place, or nothing.
        """
        parameter = self.tensor
        if parameter is not None and not isinstance(parameter, nn.Parameter):
            # A read puts back what an interrupted forward has replaced.
            parameter = parameter_slots(self.owner)[self.attribute]
        return parameter if isinstance(parameter, nn.Parameter) else self._refuse(parameter)

    @property
    def tensor(self) -> Tensor | None:
        """What is in this place now: a parameter, or a tensor that replaces it for a forward."""
        # By dict: a recomputation reads an idle module's parameters detached.
        slots = parameter_slots(self.owner)
        return (
            dict.__getitem__(slots, self.attribute) if self.attribute in slots else self._refuse()
        )

    def put(self, tensor: Tensor | None) -> None:
        """Put a parameter into this place, or a tensor that replaces it for a forward."""
        # setattr accepts only a Parameter.
        parameter_slots(self.owner)[self.attribute] = tensor  # type: ignore[assignment]

    def _refuse(self, found: Tensor | None = None) -> NoReturn:
        what = "nothing" if found is None else f"a {type(found).__name__}"
        raise RuntimeError(
            f"the model has changed: a parameter should be at {self.name}, found {what}. close() "
            "the DynamicAllocationOptimizer before a parameter is pruned, parametrized or removed, "
            "and build a new one after that."
        )


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

    @property
    def is_frozen(self) -> bool:
        """Whether requires_grad is False for every parameter."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that are in the slots now, each once."""
        return iter({id(p): p for p in (slot.parameter for slot in self.slots)}.values())
