"""How large an optimizer's state will be, for parameters that it has not updated so far.

State is created at the first update of a parameter. Its size is the optimizer's own affair (two
moments, a factored one, eight bits), so it is not computed here: the optimizer updates a copy of
one parameter of each kind, which is deleted afterwards. Torch's own optimizers do so on the meta
device, which takes no memory. Others may have kernels of their own, which the meta device has not:
they update real copies, one at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynalora_optim._base.collectives import local_part
from dynalora_optim._base.live_bytes import LiveBytes, storage_bytes
from dynalora_optim._base.trees import tensors
from dynalora_optim.memory._device import grain
from dynalora_optim.memory._rehearsal import Rehearsal
from dynalora_optim.update._master_weights import MASTER, ROUNDING_BYTES
from dynalora_optim.update._param_groups import LINE, ParamGroup, State
from dynalora_optim.update._rule import UpdateRule

_STEPS = 2  # some optimizers create a part of their state at the second update


@dataclass(frozen=True)
class StateSize:
    """The bytes that belong to one parameter, or to several.

    Attributes:
        masters: Float32 copies.
        state: The rest of the state, without what is always on the host.
        temporary: Temporary tensors of an update.
    """

    masters: int = 0
    state: int = 0
    temporary: int = 0

    def largest(self, other: StateSize) -> StateSize:
        """Return the larger of each part."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return StateSize(*(max(pair) for pair in pairs))


class StateSizes:
    """The sizes of the state of parameters, rehearsed once for each kind of parameter."""

    def __init__(self, rule: UpdateRule) -> None:
        self._rule = rule
        self._on_meta = type(rule.optimizer).__module__.startswith("torch.optim")
        self._of_kind: dict[object, StateSize] = {}
        self._of_all: dict[frozenset[int], int] = {}

    def of(self, parameter: Tensor, piece: ParamGroup, state: State) -> StateSize:
        """Return the sizes for ``parameter``: rehearsed, or what there is if that is more.

        Raises:
            ValueError: The parameter has no state, and the update of a copy is not possible.
        """
        kind = _kind(parameter, piece)
        device = parameter.device
        existing = existing_size(state.get(parameter, {}), device.type, unit=grain(device))
        if kind not in self._of_kind:
            try:
                self._of_kind[kind] = self._of_copies(piece, [parameter])
            except Exception as error:
                if not state.get(parameter):
                    raise ValueError(self._refusal(parameter, error)) from error
                return existing
        self._of_kind[kind] = self._of_kind[kind].largest(existing)
        return self._of_kind[kind]

    def of_update(self, pieces: Sequence[ParamGroup], wanted: Iterable[Tensor]) -> int:
        """Return the temporary bytes of one update of all ``wanted`` parameters; 0 if not known."""
        if not self._on_meta:
            return 0
        ids = frozenset(map(id, wanted))
        if ids not in self._of_all:
            self._of_all = {ids: self._of_all_lines(pieces, ids)}
        return self._of_all[ids]

    def _of_all_lines(self, pieces: Sequence[ParamGroup], ids: frozenset[int]) -> int:
        lines: dict[int, ParamGroup] = {piece[LINE]: piece for piece in pieces}
        found = 0
        for line, piece in lines.items():
            own = [p for one in pieces if one[LINE] == line for p in one["params"] if id(p) in ids]
            try:
                found = max(found, self._of_copies(piece, own).temporary) if own else found
            except Exception:
                return 0
        return found

    def _of_copies(self, piece: ParamGroup, parameters: Sequence[Tensor]) -> StateSize:
        copies = [self._copy(parameter) for parameter in parameters]
        group = {**piece, "params": copies, "positions": range(len(copies))}
        if self._on_meta and parameters[0].device.type == "cuda" and not group.get("fused"):
            group.update({"foreach": True} if group.get("foreach", True) is None else {})
        state: State = defaultdict(dict)
        memory: LiveBytes = Rehearsal(meta=True) if self._on_meta else LiveBytes()
        temporary = max(map(_rounding, parameters)) if self._rule.rounds_at_random else 0
        for _ in range(_STEPS):
            for copy in copies:
                copy.grad = torch.zeros_like(copy)
            with memory, torch.no_grad():
                memory.restart()
                self._rule.rehearse([group], state)
                temporary = max(temporary, memory.peak - memory.live)
        masters, own = 0, 0
        for copy in copies:
            places = "meta", parameters[0].device.type
            size = existing_size(state.get(copy, {}), *places, unit=grain(parameters[0].device))
            masters, own = masters + size.masters, own + size.state
        return StateSize(masters, own, temporary)

    def _copy(self, parameter: Tensor) -> nn.Parameter:
        own = local_part(parameter.detach())
        return nn.Parameter(torch.empty_like(own, device="meta") if self._on_meta else own.clone())

    def _refusal(self, parameter: Tensor, error: Exception) -> str:
        return (
            f"Budget(total=...) has to know the size of the state that "
            f"{type(self._rule.optimizer).__name__} will create for a parameter of shape "
            f"{tuple(parameter.shape)}, but its update of a copy raised {type(error).__name__}: "
            f"{error}. Pass memory= in place of total=."
        )


def existing_size(values: Mapping[str, Any], *devices: str, unit: int = 1) -> StateSize:
    """Return the sizes of the state of one parameter, also if it is on the host for a while.

    Single numbers may be on the host for good; they count if they are on one of ``devices``.
    """
    sizes = {
        is_master: storage_bytes(
            (
                part
                for key, value in values.items()
                for part in tensors(value)
                if (key == MASTER) is is_master and (part.ndim or part.device.type in devices)
            ),
            unit,
        )
        for is_master in (True, False)
    }
    return StateSize(sizes[True], sizes[False])


def _rounding(parameter: Tensor) -> int:
    """Return the temporary bytes of rounding the copy of ``parameter`` when its module pauses."""
    return local_part(parameter).numel() * ROUNDING_BYTES


def _kind(parameter: Tensor, piece: ParamGroup) -> object:
    own = local_part(parameter)
    return tuple(own.shape), own.dtype, own.device, own.stride(), piece[LINE]
