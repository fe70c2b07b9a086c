"""A copy of a model with parameters that take no memory, whole ones also under ``fully_shard``.

Its tensors are fake: they have a shape, a dtype and a device, but no data. So its blocks can be run
one by one, which those of a sharded model cannot, on no device memory and without other ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynalora_optim._base.live_bytes import uncounted
from dynalora_optim._base.torch_private import parameter_slots, tree_map
from dynalora_optim._base.torch_private_fsdp import (
    ShardedUnit,
    class_before,
    fake_mode,
    is_unit,
    things_of_units,
    units,
)
from dynalora_optim._base.trees import has_data, tensors
from dynalora_optim.groups._blocks import Block
from dynalora_optim.groups._module_group import ModuleGroup
from dynalora_optim.memory._caches import no_fakes_cached
from dynalora_optim.memory._reads import KnownNumbers
from dynalora_optim.switching._detach import ActiveCopies, drop_copied_hooks


class Replica:
    """A copy of ``model`` on fake tensors, as if it was on one device and not sharded.

    Attributes:
        model: The copy.
        units: What ``fully_shard`` has made of the model.

    Raises:
        ValueError: A part of the model cannot be copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.units = units(model)
        self._fake = fake_mode()
        self._memo: dict[int, Any] = {id(thing): _nothing for thing in things_of_units(model)}
        with _explained(model), uncounted():
            self._add_tensors(model)
            self.model: nn.Module = self._copied(model)
        for module in self.model.modules():
            drop_copied_hooks(module)
        for unit in self.units:
            self._cast(unit)

    def of(self, module: nn.Module) -> nn.Module:
        """Return the copy of a ``module`` of the model."""
        copied: nn.Module = self._memo[id(module)]
        return copied

    def block(self, block: Block) -> Block:
        """Return the copy of ``block``."""
        return Block(block.name, self.of(block.module))

    def group(self, group: ModuleGroup) -> ModuleGroup:
        """Return ``group`` with the copies of its modules."""
        slots = tuple(replace(slot, owner=self.of(slot.owner)) for slot in group.slots)
        return replace(group, modules=tuple(map(self.of, group.modules)), slots=slots)

    @contextmanager
    def running(self, *, padded: bool) -> Iterator[Callable[[Any], Any]]:
        """Enter a context in which the copy can be run, and yield a function for its arguments.

        Args:
            padded: Whether code that looks into a mask finds that it hides something, if the mask
                has too many elements to have values here.

        Raises:
            ValueError: The model cannot be run without data; it replaces the error of torch.
        """
        with ExitStack() as stack:
            stack.enter_context(_explained(self.model))
            stack.enter_context(no_fakes_cached())
            stack.enter_context(uncounted())
            stack.enter_context(self._fake)
            numbers = KnownNumbers(self._like, padded=padded)
            stack.enter_context(numbers)
            yield partial(self._call, numbers)

    def _call(self, numbers: KnownNumbers, arguments: Any) -> Any:
        """Return other tensors in the place of those among ``arguments``."""
        others: dict[int, Tensor] = {}

        def other(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) not in others:
                others[id(leaf)] = numbers.argument(leaf)
            return others[id(leaf)]

        return tree_map(other, arguments)

    def _like(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a fake tensor of the same shape; of a sharded parameter, of its whole shape."""
        with self._fake:
            return torch.empty_strided(
                tuple(tensor.shape),
                tuple(tensor.stride()),
                dtype=dtype or tensor.dtype,
                device=tensor.device,
            )

    def _add_tensors(self, model: nn.Module) -> None:
        """Let all parameters, buffers and other tensors be copied as fake ones."""
        computed = {
            place: parameter.dtype
            for unit in self.units
            for parameter in unit.parameters
            for place in ((id(module), name) for module, name in parameter.places)
        }
        for module in model.modules():
            for name, found in dict.items(parameter_slots(module)):
                if found is not None and id(found) not in self._memo:
                    fake = self._like(found.detach(), computed.get((id(module), name)))
                    self._memo[id(found)] = nn.Parameter(fake, requires_grad=found.requires_grad)
            others = [module.buffers(recurse=False), tensors(list(vars(module).values()))]
            for tensor in (tensor for found in others for tensor in found):
                if id(tensor) not in self._memo and not _is_known(tensor):
                    self._memo[id(tensor)] = self._like(tensor)

    def _copied(self, model: nn.Module) -> Any:
        # fully_shard gave these modules a class that cannot be copied.
        of_units = {module: class_before(module) for module in model.modules() if is_unit(module)}
        for module, kind in of_units.items():
            self._memo[id(module)] = kind.__new__(kind)
        for module in of_units:
            own = {key: value for key, value in vars(module).items() if not _is_ours(value)}
            vars(self.of(module)).update(copy.deepcopy(own, self._memo))
        return copy.deepcopy(model, self._memo)

    def _cast(self, unit: ShardedUnit) -> None:
        """Cast inputs and outputs as the unit does in mixed precision."""
        inputs, outputs = unit.casts
        for module in map(self.of, unit.modules):
            if inputs is not None:
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, dtype=inputs: _in_dtype((args, kwargs), dtype),
                    prepend=True,
                    with_kwargs=True,
                )
            if outputs is not None:
                module.register_forward_hook(
                    lambda _, args, output, dtype=outputs: _in_dtype(output, dtype)
                )


def _is_known(tensor: Tensor) -> bool:
    """Whether a buffer is copied with its numbers, such as positions; statistics are not."""
    return has_data(tensor) and not tensor.is_floating_point() and tensor.is_leaf


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing; this is the copy of each hook of FSDP2."""


def _is_ours(value: Any) -> bool:
    return isinstance(getattr(value, "__self__", None), ActiveCopies)


def _in_dtype(tree: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        is_number = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if is_number else leaf

    return tree_map(cast, tree)


@contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    """Explain errors that come from tensors without data.

    Raises:
        ValueError: It replaces the error that torch raised, and names a remedy.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError, TypeError) as error:
        name, why = class_before(model).__name__, str(error).splitlines()[0]
        raise ValueError(
            f"Budget: {name} is under fully_shard (FSDP2), where a budget measures a copy of the "
            f"model without data, and this fails: {why}. Use an allocator without a memory budget, "
            "such as 'discounted', or DistributedDataParallel."
        ) from error
