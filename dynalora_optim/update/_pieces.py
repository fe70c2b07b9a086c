"""The user's param groups in pieces, one for each module group, as an update needs them.

The param groups themselves stay as the user gave them, so that schedulers, monitors and checkpoints
find what they know. A piece has the options of its group. It also has the numbers that the wrapped
optimizer stores in groups (Prodigy's d, schedule-free's k): these count the updates of a module, so
that they differ between modules that were active at different times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dynalora_optim.update._param_groups import LINE, PACKED, ParameterIndex, ParamGroup

# Keys of a piece that are not options of the wrapped optimizer.
NOT_OPTIONS = frozenset(("params", "name", "param_names", "user_name", "positions", LINE, PACKED))
_ABSENT = object()


class Part(NamedTuple):
    """The part of a user's param group that is in one module group."""

    line: int
    name: str
    positions: tuple[int, ...]  # in the param group
    param_names: tuple[str, ...]


class _Own(NamedTuple):
    """A value of one piece, valid while the user's group has the value ``beside`` it."""

    value: Any
    beside: Any


class Pieces:
    """Splits param groups by module group, and keeps what the wrapped optimizer stores in pieces.

    Args:
        index: The module group of each parameter.
    """

    def __init__(self, index: ParameterIndex) -> None:
        self.index = index
        self._parts: list[list[Part]] = []  # by param group
        self._names: list[list[str]] = []
        self._known: list[list[int]] = []  # the identities of the parameters that were split
        self._own: dict[tuple[int, str], dict[str, _Own]] = {}

    def parts(self, groups: Sequence[ParamGroup]) -> list[Part]:
        """Return the parts of all ``groups``, in the order of `of`.

        Raises:
            RuntimeError: A group has parameters that are not in the model.
        """
        known = [[id(parameter) for parameter in group["params"]] for group in groups]
        if known != self._known:
            self._split(groups)
            self._known = known
        return [part for parts in self._parts for part in parts]

    def names(self, groups: Sequence[ParamGroup]) -> list[list[str]]:
        """Return, per group, the model's names of its parameters, in their order."""
        self.parts(groups)
        return self._names

    def of(self, groups: Sequence[ParamGroup]) -> list[ParamGroup]:
        """Return the pieces: new groups, each with the ``"name"`` of its module group."""
        return [self.piece(groups, part) for part in self.parts(groups)]

    def piece(self, groups: Sequence[ParamGroup], part: Part) -> ParamGroup:
        """Return one piece; its options are those of its group, and its own numbers."""
        group = groups[part.line]
        options = {key: value for key, value in group.items() if key not in NOT_OPTIONS}
        if "name" in group:
            options["user_name"] = group["name"]
        return {
            **options,
            **self._current(group, self._own.get((part.line, part.name), {})),
            "params": [group["params"][position] for position in part.positions],
            "name": part.name,
            "param_names": list(part.param_names),
            "positions": list(part.positions),
            LINE: part.line,
        }

    def keep(self, groups: Sequence[ParamGroup], changed: Iterable[ParamGroup]) -> None:
        """Keep what the wrapped optimizer has stored in pieces.

        A value that all pieces of a group have in common is put into the group.

        Args:
            groups: The user's param groups.
            changed: Pieces that have only the changed values, their name and their line.
        """
        lines: dict[int, set[str]] = {}
        for piece in changed:
            group, own = groups[piece[LINE]], self._own.setdefault((piece[LINE], piece["name"]), {})
            values = {key: value for key, value in piece.items() if key not in NOT_OPTIONS}
            for key, value in values.items():
                own[key] = _Own(value, group.get(key, _ABSENT))
            lines.setdefault(piece[LINE], set()).update(values)
        for line, keys in lines.items():
            for key in keys:
                self._join(groups[line], line, key)

    def own_numbers(self, groups: Sequence[ParamGroup], line: int) -> dict[str, dict[str, Any]]:
        """Return, by module group, the values of pieces that differ from those of their group."""
        found = {
            part.name: self._current(groups[line], self._own.get((line, part.name), {}))
            for part in self.parts(groups)
            if part.line == line
        }
        return {name: values for name, values in found.items() if values}

    def load(
        self, groups: Sequence[ParamGroup], own: Sequence[Mapping[str, Mapping[str, Any]]]
    ) -> None:
        """Load what `own_numbers` returned, one mapping per group."""
        self._own = {
            (line, name): {k: _Own(v, group.get(k, _ABSENT)) for k, v in values.items()}
            for line, (group, by_name) in enumerate(zip(groups, own, strict=True))
            for name, values in by_name.items()
        }

    def _current(self, group: ParamGroup, own: Mapping[str, _Own]) -> dict[str, Any]:
        """Return the values that no user and no scheduler has set anew since."""
        return {
            key: kept.value
            for key, kept in own.items()
            if is_same(group.get(key, _ABSENT), kept.beside)
        }

    def _join(self, group: ParamGroup, line: int, key: str) -> None:
        owns = [self._own.get((line, part.name), {}) for part in self._parts[line]]
        kept = [own[key].value for own in owns if key in own]
        if len(kept) == len(owns) and all(is_same(value, kept[0]) for value in kept):
            group[key] = kept[0]
            for own in owns:
                del own[key]

    def _split(self, groups: Sequence[ParamGroup]) -> None:
        before, self._parts, self._names = (self._parts, self._names), [], []
        for line, group in enumerate(groups):
            names, parts = self._of_group(line, group["params"], before)
            self._names.append(names)
            self._parts.append(parts)

    def _of_group(
        self, line: int, parameters: Sequence[Tensor], before: tuple[list[Any], list[Any]]
    ) -> tuple[list[str], list[Part]]:
        former, former_names = before
        if not self.index.knows(parameters):
            if line < len(former) and len(former_names[line]) == len(parameters):
                # A copy of the model, or FSDP2 has replaced the parameters; the order is the same.
                return former_names[line], former[line]
            self.index = self.index.renewed()
        if not self.index.knows(parameters):
            raise RuntimeError(
                f"param group {line} of the optimizer has parameters that are not in its model. "
                "Add parameters with add_param_group(), or build a new DynamicAllocationOptimizer."
            )
        names = self.index.names_of(parameters)
        return names, [
            Part(line, name, tuple(places), tuple(names[place] for place in places))
            for name, places in self.index.split(parameters).items()
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": []}  # a copy has other parameters


def is_same(left: object, right: object) -> bool:
    """Return whether two options are the same: one tensor, or equal values of one type."""
    if left is right:
        return True
    if isinstance(left, Tensor) or isinstance(right, Tensor) or type(left) is not type(right):
        return False
    return bool(left == right)
