"""Planning a forward on all ranks together, although each has a batch of its own.

No rank may refuse a forward that another one runs, because that would wait for it: a sharded model
gathers the parameters of each block on all ranks at the same time, and all reduce the gradients.
So all ranks know the costs of every batch that any of them has measured, in the same order. Before
a forward they exchange a few numbers: which of these costs hold for the batch of each. What follows
from them is the same on all: the refusal, or which blocks are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch

from dynalora_optim._base.collectives import gathered, gathered_numbers, number_of
from dynalora_optim.allocation._costs import Costs
from dynalora_optim.allocation._joined import joined
from dynalora_optim.allocation._saved_costs import saved_costs
from dynalora_optim.memory._habits import Habits, merged
from dynalora_optim.memory._passes import Around
from dynalora_optim.memory._shapes import Measure, MeasuredShapes, Shape

_UNKNOWN, _EMPTY = -1, -2
_KEPT = 256  # numbers of costs that are kept


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of a forward before it runs.

    Attributes:
        costs: The costs that hold for the batch of each rank, without ranks whose batch is empty.
        around: What is alive on the rank where it is most.
        is_exact: Whether these are the costs of just these batches, not of larger ones.
    """

    costs: tuple[Costs, ...]
    around: Around
    is_exact: bool

    @property
    def joined(self) -> Costs | None:
        """The costs that are nowhere less than those of any rank; None if all are empty."""
        return reduce(joined, self.costs) if self.costs else None


class Together:
    """Agrees with the other ranks on the costs of the next forward.

    Args:
        shapes: The costs of the measured batches; all ranks have the same ones.
        habits: What the loop of this rank does; it learns what the loops of other ranks do.
    """

    def __init__(self, shapes: MeasuredShapes, habits: Habits) -> None:
        self._shapes, self._habits = shapes, habits
        self._numbers: dict[int, tuple[Costs, int]] = {}  # by id

    def agree(
        self,
        batch: tuple[Shape, int],
        around: Around,
        device: torch.device,
        measure: Measure,
        *,
        exact: bool = False,
    ) -> Agreed:
        """Return what all ranks know of this forward; every rank must call this.

        Args:
            batch: The shape of this rank's batch, and the number of its elements.
            around: What is alive on this rank.
            device: For the communication.
            measure: Measures this rank's batch, or one that covers it, if no measured one does.
            exact: Whether only the costs of just this shape will do.

        Raises:
            ValueError: A rank cannot measure its batch; raised on all.
        """
        shape, elements = batch
        place, is_exact = self._shapes.place_for(shape, elements)
        place = _UNKNOWN if exact and not is_exact else place
        place, is_exact = (place, is_exact) if elements else (_EMPTY, True)
        own = [place, is_exact, *around.alive, self._table(), self._loop(around)]
        numbers = zip(*gathered_numbers(own, device), strict=True)
        places, exacts, carried, stale, least, tables, loops = numbers
        if len(set(tables)) > 1:  # such as after forwards that each rank ran by itself
            self._shapes.merge(gathered(self._shapes.entries))
            return self.agree(batch, around, device, measure, exact=exact)
        before = around.before if len(set(loops)) == 1 else self._merged(around)
        found = [self._shapes.entries[p][1] if p >= 0 else None for p in places]
        if _UNKNOWN in places:
            must = partial(measure, exact=exact) if place == _UNKNOWN else None
            answers = self._measured(shape, must)
            found = [new or old for (new, _), old in zip(answers, found, strict=True)]
            exacts = tuple(e or new for e, (_, new) in zip(exacts, answers, strict=True))
        around = Around(before, max(carried), max(stale), max(least))
        return Agreed(tuple(costs for costs in found if costs), around, all(exacts))

    def _measured(
        self, shape: Shape, measure: Callable[[], tuple[Shape, Costs]] | None
    ) -> list[tuple[Costs | None, bool]]:
        """Measure on the ranks that must, and remember it.

        Return what each has measured, and whether that is of just the shape of its batch.
        """
        found: tuple[Shape, Costs] | None = None
        failed: Exception | None = None
        try:
            found = measure() if measure else None
        except Exception as error:
            failed = error
        is_exact = bool(found and found[0] == shape)
        answers = gathered((found, is_exact, str(failed) if failed else ""))
        if failed:
            raise failed
        for rank, (*_, why) in enumerate(answers):
            if why:
                raise ValueError(f"rank {rank} cannot measure its batch: {why}")
        results: list[tuple[Costs | None, bool]] = []
        for answer, is_exact, _ in answers:
            costs = answer[1] if answer and answer[1].flops(answer[1].all_active) else None
            results.append((costs, is_exact))
            if answer and costs:
                self._shapes.add(*answer)
        return results

    def _merged(self, around: Around) -> tuple[Costs, ...]:
        """Learn what the loops of the others do; return the costs of all forwards before this."""
        before: Sequence[Costs] = around.before
        for habits, others in gathered((self._habits, around.before)):
            self._habits.merge(habits)
            before = merged(before, others)
        return tuple(before)

    def _table(self) -> int:
        return number_of([self._number(costs) for _, costs in self._shapes.entries])

    def _loop(self, around: Around) -> int:
        habits = self._habits
        return number_of((habits.seen, *map(self._number, (*habits.pattern, *around.before))))

    def _number(self, costs: Costs) -> int:
        """Return a number that is the same for equal costs on all ranks."""
        if len(self._numbers) > _KEPT:
            self._numbers.clear()
        if id(costs) not in self._numbers:
            self._numbers[id(costs)] = costs, number_of(saved_costs(costs))
        return self._numbers[id(costs)][1]
