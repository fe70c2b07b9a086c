"""The costs of batches of several shapes, and which of them hold for another batch.

The values of a batch matter in one way: attention without padding needs no mask. So whether a mask
hides anything is a size of this mask, its last one: 1 is more than 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import ge
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from dynalora_optim._base.trees import replaced
from dynalora_optim.allocation._costs import Costs
from dynalora_optim.allocation._joined import joined
from dynalora_optim.allocation._saved_costs import restored_costs, saved_costs

# For each leaf of a call's arguments: its place, its kind, and its sizes if it is a tensor. The
# last of these is 1 if it is a mask that hides something.
Shape: TypeAlias = "tuple[tuple[str, str, tuple[int, ...]], ...]"

Call: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"  # positional and keyword arguments

_KEPT = 32  # shapes whose costs are kept
_LOOSE = 2  # a batch this many times smaller than each measured one is worth a measurement,
_WORTH = 8  # unless it is smaller than the largest by more than this: then there is little to save
_FREE, _PER = 1, 500  # how many such measurements there may be, and one more per so many forwards


class Measure(Protocol):
    """A function that measures a batch, or, unless it must be ``exact``, one that covers it."""

    def __call__(self, *, exact: bool) -> tuple[Shape, Costs]:
        """Return the shape of the batch that was measured, and its costs."""
        ...


def shape_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Shape:
    """Return the shape of a call; other calls of this shape take the same memory."""
    casts = [
        f"{kind}:{torch.get_autocast_dtype(kind)}"
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    ]
    return (("", ",".join(casts), ()), *_leaves(args), *_leaves(kwargs))


def _leaves(tree: Any) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for path, leaf in _places("", tree):
        if isinstance(leaf, Tensor):
            kind = f"{leaf.dtype}{'+' * leaf.requires_grad}"
            yield path, kind, (*leaf.shape, int(_hides(path, leaf)))
        else:  # a flag may change what is computed; a number, such as the count of items, does not
            is_flag = leaf is None or isinstance(leaf, (bool, str))
            yield path, repr(leaf) if is_flag else type(leaf).__name__, ()


def _places(path: str, tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key in sorted(tree, key=str):
            yield from _places(f"{path}.{key}", tree[key])
    elif isinstance(tree, (list, tuple)):
        for number, item in enumerate(tree):
            yield from _places(f"{path}.{number}", item)
    else:
        yield path, tree


def _hides(path: str, tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a mask with a zero in it; without a name, any of numbers may be.

    It waits for the device, as models do that look into their mask.
    """
    name = path.rpartition(".")[2]
    if "mask" not in name and (tensor.is_floating_point() or not name.isdigit()):
        return False
    return not tensor.is_meta and not bool(tensor.all())


def is_padded(shape: Shape) -> bool:
    """Return whether a mask of this call hides something."""
    return any(sizes[-1] for _, _, sizes in shape if sizes)


def covers(large: Shape, small: Shape) -> bool:
    """Return whether ``large`` is at least as large as ``small`` in each dimension of each tensor.

    Sizes cannot be compared if the two calls have other arguments; then the result is False.
    """
    if len(large) != len(small):
        return False
    return all(
        a[:2] == b[:2] and len(a[2]) == len(b[2]) and all(map(ge, a[2], b[2]))
        for a, b in zip(large, small, strict=True)
    )


def enlarged(call: Call, sizes: Shape) -> Call:
    """Return a call's arguments with zeros at the end of their tensors, up to these ``sizes``.

    A mask of zeros hides something, and 0 is a position in any table.
    """
    larger, at = call, {path: size[:-1] for path, _, size in sizes if size}
    for path, tensor in (place for part in call for place in _places("", part)):
        if isinstance(tensor, Tensor) and tuple(tensor.shape) != at[path]:
            padded = tensor.new_zeros(at[path])
            padded[tuple(map(slice, tensor.shape))] = tensor.detach()
            larger = replaced(larger, tensor, padded.requires_grad_(tensor.requires_grad))
    return larger


@dataclass
class MeasuredShapes:
    """The costs of the batches measured so far, each with its shape.

    Attributes:
        entries: These shapes and costs.
        forwards: How many batches have come.
        recomputes: Whether the last forward was planned to recompute blocks. As long as none does,
            the costs of a small batch cannot save work.
    """

    entries: list[tuple[Shape, Costs]] = field(default_factory=list)
    forwards: int = 0
    _extra: int = 0
    recomputes: bool = True

    def find(self, shape: Shape, elements: int) -> Costs | None:
        """Return the costs of the smallest measured batch that covers this one.

        It is None if there is none. It is also None, now and then, if the batch is so much smaller
        that its own costs are worth a measurement: with them less is recomputed.
        """
        self.forwards += 1
        known = [
            (costs.batch, other, costs) for other, costs in self.entries if covers(other, shape)
        ]
        _, _, found = min(known, key=lambda entry: entry[:2], default=(0, (), None))
        largest = max((costs.batch for _, costs in self.entries), default=0)
        is_worth_it = self.recomputes and 0 < elements >= largest / _WORTH
        is_loose = is_worth_it and found is not None and found.batch >= _LOOSE * elements
        if is_loose and self._extra < _FREE + self.forwards // _PER:
            self._extra += 1
            return None
        return found

    def around(self, shape: Shape) -> Shape | None:
        """Return the shape of the largest measured batch that would cover this one with its mask.

        It is None if a measured batch covers this one already.
        """
        if any(covers(other, shape) for other, _ in self.entries):
            return None
        bare = _without_masks(shape)
        found = [entry for entry in self.entries if covers(_without_masks(entry[0]), bare)]
        return max(found, key=lambda entry: entry[1].batch)[0] if found else None

    def measured(
        self, call: Call, shape: Shape, measure: Callable[..., Costs], *, exact: bool
    ) -> tuple[Shape, Costs]:
        """Return the shape and the costs of this batch, or of a larger one with its mask.

        If only the mask is new, such as that of the first batch with padding, the largest batch is
        measured with such a mask, so that later ones need no measurement.

        Args:
            call: The arguments of the model.
            shape: Their shape.
            measure: Returns the costs of a call with such arguments.
            exact: Whether only the batch itself will do.
        """
        larger = None if exact else self.around(shape)
        if larger:
            try:
                wide = enlarged(call, larger)
                found = shape_of(*wide)
                if covers(found, shape):
                    return found, measure(*wide)
            except (RuntimeError, ValueError, TypeError, LookupError):
                pass  # its arguments belong together in another way; the batch itself will do
        return shape, measure(*call)

    def add(self, shape: Shape, costs: Costs) -> None:
        """Keep the costs of a batch of this shape; drop the smallest if there are too many."""
        self.entries = [entry for entry in self.entries if entry[0] != shape]
        self.entries.append((shape, costs))
        if len(self.entries) > _KEPT:
            self.entries.remove(min(self.entries, key=lambda entry: entry[1].batch))

    def merge(self, of_ranks: Iterable[Sequence[tuple[Shape, Costs]]]) -> None:
        """Keep what all ranks have measured; the result is the same on all."""
        found: dict[Shape, Costs] = {}
        for shape, costs in (entry for entries in of_ranks for entry in entries):
            found[shape] = joined(found.get(shape, costs), costs)
        self.entries = []
        for shape, costs in found.items():
            self.add(shape, costs)

    def is_of(self, shape: Shape, costs: Costs) -> bool:
        """Return whether these are the costs of a batch of just this shape."""
        return any(other == shape and known is costs for other, known in self.entries)

    def place_for(self, shape: Shape, elements: int) -> tuple[int, bool]:
        """Return the place of what `find` returns, -1 for None, and whether it has this shape."""
        found = self.find(shape, elements)
        for place, (known, costs) in enumerate(self.entries):
            if costs is found:
                return place, known == shape
        return -1, False

    def drop(self, costs: Costs) -> None:
        """Forget the batch that has these costs."""
        self.entries = [entry for entry in self.entries if entry[1] is not costs]

    def state(self) -> dict[str, Any]:
        """Return the values that a resumed run needs."""
        entries = [[_plain(shape), saved_costs(costs)] for shape, costs in self.entries]
        numbers = {"forwards": self.forwards, "extra": self._extra}
        return {"entries": entries, **numbers, "recomputes": self.recomputes}

    @staticmethod
    def of(state: Mapping[str, Any], *, modules: int) -> MeasuredShapes:
        """Return what `state` was made from.

        Raises:
            ValueError: ``state`` has another form.
        """
        try:
            entries = [
                (_shape(shape), restored_costs(costs, modules=modules))
                for shape, costs in state["entries"]
            ]
            numbers = int(state["forwards"]), int(state["extra"])
            return MeasuredShapes(entries, *numbers, bool(state.get("recomputes", True)))
        except (KeyError, TypeError) as error:
            raise ValueError(f"state_dict has shapes of another form: {error!r}.") from error


def _without_masks(shape: Shape) -> Shape:
    return tuple((path, kind, sizes[:-1]) for path, kind, sizes in shape)


def _plain(shape: Shape) -> list[list[Any]]:
    return [[path, kind, list(sizes)] for path, kind, sizes in shape]


def _shape(plain: Sequence[Sequence[Any]]) -> Shape:
    return tuple((str(path), str(kind), tuple(map(int, sizes))) for path, kind, sizes in plain)
