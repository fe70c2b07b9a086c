"""What a process holds for training beside the step, for a budget on everything."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from dynalora_optim._base.live_bytes import flattened, storage_bytes, tensor_bytes
from dynalora_optim._base.trees import tensors
from dynalora_optim.allocation._amounts import DEVICE
from dynalora_optim.allocation._budget import Budget
from dynalora_optim.allocation._causes import total_limit
from dynalora_optim.allocation._resident import Resident, rate
from dynalora_optim.groups._blocks import Block
from dynalora_optim.memory._device import capacity, in_use, rounding
from dynalora_optim.memory._meta import companions
from dynalora_optim.memory._state_sizes import StateSize, StateSizes, existing_size
from dynalora_optim.update._param_groups import ParamGroup, State
from dynalora_optim.update._pause import PausedState
from dynalora_optim.update._rule import UpdateRule

# A block with what it keeps and what its backward takes for a moment, and two hidden states.
_BLOCKS_TO_MEASURE = 2


class Holder(Protocol):
    """The optimizer, as far as it must be known here."""

    @property
    def module_groups(self) -> list[ParamGroup]:
        """The param groups, split by module group."""
        ...

    @property
    def state(self) -> State:
        """The state of all parameters."""
        ...

    def trained_parameters(self) -> list[Tensor]:
        """Return the parameters that may ever be updated."""
        ...


def total_of(allocator: object) -> int | str | None:
    """Return the ``total`` of a budget, also of one within another allocator; else None."""
    inner = getattr(allocator, "allocator", None)
    total: int | str | None = getattr(allocator, "total", None)
    return total if total is not None or inner is None else total_of(inner)


def room_to_measure(allocator: object, resident: Resident, blocks: int) -> int | None:
    """Return the bytes that measuring may take, with what is alive in a step; None for any number.

    What a share is of is known only when all is measured. Measuring takes about one of the
    ``blocks``: where the share may be less, there is room for nothing on the device.
    """
    if isinstance(allocator, Budget):
        if allocator.total is not None:
            return total_limit(allocator.total, resident) if resident.weights else None
        if isinstance(allocator.memory, float):
            return 0 if allocator.memory * blocks < _BLOCKS_TO_MEASURE else None
        return cast(int, allocator.memory)
    inner = getattr(allocator, "allocator", None)
    return None if inner is None else room_to_measure(inner, resident, blocks)


class Holdings:
    """Counts what ``holder`` and its model hold, and predicts the state that is still to come.

    Args:
        holder: The optimizer, of which a weak reference is kept.
        rule: The update rule.
        model: The model.
        blocks: Its blocks.
        paused: What happens to the state of modules that pause.
        total: The budget's ``total``.
    """

    def __init__(
        self,
        holder: Holder,
        rule: UpdateRule,
        model: nn.Module,
        blocks: Sequence[Block],
        *,
        paused: PausedState,
        total: int | str,
    ) -> None:
        self._holder = weakref.ref(holder)
        self._sizes = StateSizes(rule)
        self._model, self._blocks = model, blocks
        self._paused, self._total = paused, total
        self._surroundings: tuple[int, int] | None = None  # the device's capacity, other tensors
        self._seen = -1  # the most parameters with state at a count

    def count(self, args: Any, kwargs: Any) -> Resident:
        """Return what is held, at its largest; the forward of this call comes next.

        Raises:
            ValueError: ``total`` asks for a device that does not tell its memory, or the size of
                the optimizer's state cannot be predicted.
        """
        holder = self._holder()
        assert holder is not None
        trained = holder.trained_parameters()
        device = trained[0].device
        parameters = _weights(self._model)
        weights = _bytes_on(device, parameters)
        buffers = _bytes_on(device, [*parameters, *_buffers(self._model)]) - weights
        if self._surroundings is None:
            known = weights + buffers + self._present(holder.state, device)
            known += _bytes_on(device, tensors((args, kwargs)))
            room = capacity(device) if self._total == DEVICE else 0
            other = max(in_use(device) - known, 0) + rounding(device, len(self._blocks))
            self._surroundings = room, other
        room, other = self._surroundings
        self._seen = max(self._seen, len(holder.state))
        own = self._of_optimizer(holder, trained)
        return replace(own, weights=weights, buffers=buffers, capacity=room, other=other)

    def has_new_state(self) -> bool:
        """Return whether more parameters have a state than at any `count` so far."""
        holder = self._holder()
        return holder is not None and len(holder.state) > self._seen

    def _present(self, state: State, device: torch.device) -> int:
        """Return the bytes of state and gradients on the device now."""
        found = list(tensors(list(state.values())))
        found += [p.grad for p in self._model.parameters() if p.grad is not None]
        return _bytes_on(device, found)

    def _of_optimizer(self, holder: Holder, trained: Sequence[Tensor]) -> Resident:
        """Return the parts of the result that concern the optimizer."""
        pieces, state = holder.module_groups, holder.state
        wanted = set(map(id, trained))
        sizes = {
            id(p): self._sizes.of(p, piece, state)
            for piece in pieces
            for p in piece["params"]
            if id(p) in wanted
        }
        blocks = [_Share.of(block.module, sizes) for block in self._blocks]
        outside = _sum(sizes.values())  # those in blocks are taken out: see `_Share.of`
        others = _sum(
            existing_size(v, p.device.type) for p, v in state.items() if id(p) not in wanted
        )
        keeps = self._keeps(trained[0].device)
        idle = sum(block.size.state for block in blocks) if keeps else 0
        return Resident(
            masters=outside.masters + others.masters,
            state=outside.state + others.state + idle,
            idle=idle,
            active=max(block.rate_of_active(keeps=keeps) for block in blocks),
            copies=max(rate(block.size.masters, block.gradients) for block in blocks),
            update=max(rate(block.size.temporary, block.gradients) for block in blocks),
            outer_update=outside.temporary,
            most_update=self._sizes.of_update(pieces, trained),
        )

    def _keeps(self, device: torch.device) -> bool:
        """Return whether the state of modules that pause stays on the device."""
        on_host = device.type == "cpu"
        return self._paused == "keep" or (self._paused == "offload" and on_host)


@dataclass(frozen=True)
class _Share:
    """The state of the parameters of one block, and the bytes of their gradients."""

    size: StateSize
    gradients: int

    @staticmethod
    def of(block: nn.Module, sizes: dict[int, StateSize]) -> _Share:
        """Take the sizes of the block's parameters out of ``sizes``, and return their sum."""
        own = [p for p in block.parameters() if p.requires_grad]
        found = _sum(sizes.pop(id(p)) for p in own if id(p) in sizes)
        return _Share(found, sum(map(tensor_bytes, own)))

    def rate_of_active(self, *, keeps: bool) -> int:
        """Return how many bytes exist only while the block trains, for its gradients."""
        return rate(self.size.masters + (0 if keeps else self.size.state), self.gradients)


def _sum(sizes: Iterable[StateSize]) -> StateSize:
    found = list(sizes)
    return StateSize(
        sum(size.masters for size in found),
        sum(size.state for size in found),
        sum(size.temporary for size in found),
    )


def _weights(model: nn.Module) -> list[Tensor]:
    """Return the parameters, and the tensors that quantised ones refer to (bitsandbytes)."""
    found: list[Tensor] = []
    for parameter in model.parameters():
        found += [parameter, *_attributes(parameter), *companions(parameter)]
    return found


def _buffers(model: nn.Module) -> list[Tensor]:
    """Return the buffers, and tensors that are plain attributes of modules."""
    attributes = [tensor for module in model.modules() for tensor in _attributes(module)]
    return [*model.buffers(), *attributes]


def _attributes(owner: object) -> list[Tensor]:
    values = getattr(owner, "__dict__", {}).values()
    return [value for value in values if isinstance(value, Tensor) and value.grad_fn is None]


def _bytes_on(device: torch.device, found: Iterable[Tensor]) -> int:
    parts = (part for tensor in found for part in flattened(tensor))
    return storage_bytes(part for part in parts if part.device == device)
