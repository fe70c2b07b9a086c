"""Measuring a model with several lists of blocks: their order, and each route (see `Costs`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynalora_optim.allocation._costs import Costs
from dynalora_optim.groups._blocks import Block, in_lists
from dynalora_optim.groups._layout import blocks_of
from dynalora_optim.groups._module_group import ModuleGroup
from dynalora_optim.memory._block_list import Layout
from dynalora_optim.memory._block_profiler import Profiler
from dynalora_optim.memory._block_run import BlockRunner
from dynalora_optim.memory._room import counter
from dynalora_optim.memory._routing import Routing
from dynalora_optim.memory._stand_ins import undisturbed
from dynalora_optim.switching._module_switch import ModuleSwitch


@dataclass(frozen=True)
class Batch:
    """What the model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Routes:
    """Measures the costs of every choice for one batch.

    Args:
        model: The adapted model.
        blocks: Its blocks, as it defines them.
        groups: The allocated groups, all of them active.
        switch: Makes groups active and inactive; what it has set is lost.
        room: The bytes that measuring may take; None for any number.

    Attributes:
        prefix_parameters: The parameters that train before a list of blocks, which the gradient of
            this list's input reaches.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        groups: Sequence[ModuleGroup],
        switch: ModuleSwitch,
        room: int | None = None,
    ) -> None:
        self._room = room
        self._model = model
        self._blocks = blocks
        self._groups = groups
        self._switch = switch
        self.prefix_parameters: list[Tensor] = []

    def measure(self, batch: Batch, known: Costs | None) -> Costs:
        """Return the costs for ``batch``.

        Args:
            batch: What the model is called with.
            known: The costs of an earlier batch; None if there are none.

        Raises:
            ValueError: The blocks do not run once each, list by list.
        """
        lists = in_lists(self._blocks)
        places = {id(block): place for place, block in enumerate(self._blocks)}
        runs = [True]
        if len(lists) > 1:
            firsts = _order(self._model, lists, batch)
            lists = _sorted(lists, firsts, known, places)
            runs = [id(found[0]) in firsts for found in lists]
        blocks = [block for found in lists for block in found]
        order = tuple(places[id(block)] for block in blocks)
        ranges, stop = [], 0
        for found in lists:
            ranges.append(range(stop, stop := stop + len(found)))
        homes = blocks_of(self._groups, blocks)
        if known:  # then it is also known which groups never get a gradient
            pairs = zip(homes, known.group_blocks, strict=True)
            homes = [home if before is not None else None for home, before in pairs]
        layout = Layout.of(blocks, self._groups, homes)
        main, *others = self._measured(batch, layout, ranges, runs)
        is_same = order == tuple(range(len(order)))
        return replace(main, routes=tuple(others), order=() if is_same else order)

    def _measured(
        self, batch: Batch, layout: Layout, ranges: Sequence[range], runs: Sequence[bool]
    ) -> list[Costs]:
        """Return the costs of each route, from that of the first list on."""
        runner, routes = BlockRunner(counter(self._room), self._switch), []
        for number, found in enumerate(ranges):
            if not runs[number]:
                continue
            before = layout.members[: found.start]
            idle = {group.name for members in before for group in members}
            names = {group.name for group in self._groups} - idle
            self._switch.set_flags(self._groups, names)
            later = [
                r for r, does in zip(ranges, runs, strict=True) if does and r.start >= found.start
            ]
            profiler = Profiler(self._model, layout, self._switch, later, runner)
            route = profiler.measure(batch.args, batch.kwargs)
            unread = profiler.unread.intersection(layout.homes)
            if unread:  # their groups cost almost nothing, wherever the backward pass ends
                homes = [None if home in unread else home for home in layout.homes]
                again = Layout.of(layout.blocks, self._groups, homes)
                return self._measured(batch, again, ranges, runs)
            self.prefix_parameters += profiler.prefix_parameters + profiler.inner_parameters
            routes.append(route)
            # What is pinned or comes before this list trains in any case.
            if route.prefix or any(position in found for position in route.pinned):
                break
        return _complete(routes, ranges, runs)


def _complete(
    routes: Sequence[Costs], ranges: Sequence[range], runs: Sequence[bool]
) -> list[Costs]:
    """Add what does not run with this batch: lists of no cost, and routes that end in them."""
    found: list[Costs] = []
    measured = {route.first: route for route in routes}
    for number in reversed(range(len(ranges))):
        route, start = measured.get(ranges[number].start), ranges[number].start
        if route:
            reached = dict(route.own)
            own = [(r.start, reached.get(r.start, r.stop)) for r in ranges[number + 1 :]]
            found.insert(0, replace(route, own=tuple(own)))
        elif found and not runs[number]:
            following = ranges[number + 1]  # which no gradient from this list reaches
            stop = following.start if found[0].prefix else following.stop
            own = [(following.start, stop), *found[0].own]
            found.insert(0, replace(found[0], first=start, own=tuple(own)))
    return found


def _order(model: nn.Module, lists: Sequence[Sequence[Block]], batch: Batch) -> dict[int, int]:
    """Return when each list that runs begins, by the id of its first block.

    Raises:
        ValueError: The lists do not run one after the other.
    """
    ran: list[Block] = []
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(Routing())  # without data no scores can be compared
        for block in (block for found in lists for block in found):
            hook = partial(_note, ran, block)
            stack.callback(block.module.register_forward_pre_hook(hook).remove)
        model(*batch.args, **batch.kwargs)
    firsts = {}
    for found in lists:
        mine = set(map(id, found))
        times = [time for time, block in enumerate(ran) if id(block) in mine]
        if times and [ran[time] for time in times] != [*found]:
            raise ValueError(
                f"Budget: the blocks must run once each, in their order, but those of "
                f"{_name(found)} did not (a tower that the model uses several times, or layer "
                "drop). Use an allocator without a memory budget, such as 'discounted'."
            )
        if times and times[-1] - times[0] >= len(found):
            between = next(b for b in ran[times[0] :] if id(b) not in mine)
            raise ValueError(
                f"Budget: the blocks of {_name(found)} do not run one after the other: "
                f"{between.name} runs between them, so that the two lists form no sequence. Adapt "
                "the blocks of one of them only, or use an allocator without a memory budget, "
                "such as 'discounted'."
            )
        if times:
            firsts[id(found[0])] = times[0]
    return firsts


def _note(ran: list[Block], block: Block, module: nn.Module, args: Any) -> None:
    ran.append(block)


def _name(found: Sequence[Block]) -> str:
    return found[0].name.rpartition(".")[0] or "the model"


def _sorted(
    lists: Sequence[list[Block]],
    firsts: Mapping[int, int],
    known: Costs | None,
    places: Mapping[int, int],
) -> list[list[Block]]:
    """Return the lists as they run; those that do not run now keep their place, or come first.

    Raises:
        ValueError: They run in another order than is ``known``.
    """
    if known is None:
        return sorted(lists, key=lambda found: firsts.get(id(found[0]), -1))
    ranks = {place: rank for rank, place in enumerate(known.order or range(len(places)))}
    found = sorted(lists, key=lambda found: ranks[places[id(found[0])]])
    times = [firsts[id(one[0])] for one in found if id(one[0]) in firsts]
    if times != sorted(times):
        raise ValueError(
            f"Budget: {_name(found[0])} and the other lists of blocks run in another order than "
            "with the first batch, so that no one plan holds for both. Use an allocator without "
            "a memory budget, such as 'discounted'."
        )
    return found
