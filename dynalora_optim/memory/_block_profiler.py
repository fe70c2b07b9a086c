"""Measuring what every choice of blocks costs, before the first training forward.

The model runs forward once without a graph. During this pass every block is also run by itself,
forward and backward, in each role that it can have. The bytes that it holds, and the most bytes
alive, are counted exactly (`LiveBytes`). Only one block's graph is alive at a time, so that
measuring needs the memory to train one block, and two hidden states. That is less than any budget
in which each of several blocks can train. See `_room` for smaller ones.

A model with several lists of blocks runs once for each list in which a backward pass can end (see
`Costs`). What runs between two lists and after the last one records its graph in this pass, which
begins at the outputs of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from contextvars import Context
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim._base.live_bytes import tensor_bytes
from dynalora_optim._base.trees import (
    elements,
    first_tensor,
    leaves,
    replaced,
    tensors,
    trainable_leaves,
)
from dynalora_optim.allocation._costs import Costs, Use
from dynalora_optim.groups._blocks import outside
from dynalora_optim.memory._block_list import BlockList, Layout, after_all, anchors_of, finished
from dynalora_optim.memory._block_run import BlockRunner
from dynalora_optim.memory._graph_parts import GraphParts, now, try_backward
from dynalora_optim.memory._stand_ins import (
    block_input,
    enter,
    loss_of,
    outside_checkpoint,
    own_loss,
    undisturbed,
)
from dynalora_optim.switching._module_switch import ModuleSwitch

_SCALARS = 1024  # bytes that no block shows: the loss, its gradient, data of a checkpoint
# What a loss outside of the model may take, in sizes of the output: a cross entropy makes as many
# logarithms as there are logits, and as many gradients.
_LOSS = 2


class Profiler:
    """Measures the blocks in one forward pass of ``model``; see `measure`.

    Args:
        model: The adapted model.
        layout: Its blocks and groups.
        switch: Makes groups active and inactive.
        lists: The blocks of each list that runs, without the lists before this route.
        runner: Measures each block, with its memory.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        switch: ModuleSwitch,
        lists: Sequence[range],
        runner: BlockRunner,
    ) -> None:
        self._model = model
        self._layout = layout
        self._blocks = layout.blocks
        self._switch = switch
        self._lists = [BlockList(found) for found in lists]
        self._runner = runner
        self._memory = runner.memory
        self._waiting = [position for found in lists for position in found]  # to be measured
        self._is_measuring = False
        self._prefix: Use | None = None
        self._kept: list[Tensor] = []  # arguments of blocks that their graphs may hold
        self._graphs: list[Any] = []  # of what runs between two lists: the nodes of its results
        self.prefix_parameters: list[Tensor] = []
        self.inner_parameters: list[Tensor] = []  # of what runs between two lists

    @property
    def unread(self) -> frozenset[int]:
        """The blocks that have run, but never get a gradient, because nothing reads them."""
        return frozenset(position for found in self._lists for position in found.unread)

    def measure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Costs:
        """Return the costs of every choice for the batch that the model is called with.

        Gradients, buffers and random numbers are unchanged afterwards.

        Raises:
            ValueError: The blocks do not run once each, in their order.
        """
        with ExitStack() as stack:
            stack.enter_context(undisturbed(self._model))
            stack.enter_context(torch.enable_grad())
            stack.callback(self._runner.end)  # also after an error within a block
            self._runner.begin()
            for handle in self._hooks():
                stack.callback(handle.remove)
            stack.enter_context(self._memory)
            stack.enter_context(self._runner.routing)
            output = [self._model(*args, **kwargs)]
            if self._waiting:
                raise ValueError(self._out_of_order(self._waiting[0]))
            head = self._head(output)
        first = self._lists[0]
        return Costs(
            blocks=finished(self._lists, len(self._blocks)),
            group_blocks=tuple(self._layout.homes),
            pinned=self._layout.pinned(),
            head=head,
            forward_base=first.base + _SCALARS,
            backward_base=first.back + _SCALARS,
            entry=first.entry,
            head_gradients=sum(map(tensor_bytes, self._head_parameters())),
            prefix=after_all(self._lists, self._prefix),
            batch=elements(args, kwargs),
            before=self._before_blocks + _SCALARS,
            prefix_gradients=sum(map(tensor_bytes, self.prefix_parameters)),
            first=first.blocks.start,
            own=tuple((one.blocks.start, one.reached) for one in self._lists if one is not first),
            **self._outputs,
        )

    def _hooks(self) -> Iterator[RemovableHandle]:
        for found in self._lists:
            for position in found.blocks:
                module = self._blocks[position].module
                yield module.register_forward_pre_hook(
                    self._before(found, position), with_kwargs=True, prepend=True
                )
                # First of all, so that whoever records outputs records these.
                yield module.register_forward_hook(self._anchored(found), prepend=True)
                yield module.register_forward_hook(self._after(found, position), with_kwargs=True)

    def _before(self, found: BlockList, position: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_measuring:
                return
            if not self._waiting or position != self._waiting[0]:
                raise ValueError(self._out_of_order(position))
            x = block_input(args, kwargs)
            others = [tensor for tensor in tensors((args, kwargs)) if tensor is not x]
            if position == found.blocks.start:
                self._enter_list(found, x, others)
            if found is not self._lists[0]:
                self._see(found, position, others)
            self._kept += others
            self._memory.restart()
            self._runner.routing.choices = 0
            self._start = self._memory.live - tensor_bytes(x)

        return hook

    def _anchored(self, found: BlockList) -> Callable[..., Any]:
        """Return a hook: what the block returns begins a graph, also where no graph is recorded."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self._is_measuring:
                return None
            y = first_tensor(output)
            with torch.enable_grad():
                return replaced(output, y, enter(found.new_anchor().to(y), y))

        return hook

    def _after(self, found: BlockList, position: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if self._is_measuring:
                return
            below, groups = self._memory.peak - self._start, self._layout.members[position]
            self._is_measuring = True
            with outside_checkpoint(module):
                call = found.call(position, args, kwargs, is_reached=bool(self._prefix))
                # Whoever records the outputs of the running forward does not record these.
                cost, stays = Context().run(self._runner.cost, module, groups, call, below)
            self._is_measuring = False
            found.costs.append(cost)
            found.stays.append(stays)
            self._waiting.pop(0)
            if position == found.blocks[-1]:
                self._leave_list(found)

        return hook

    def _enter_list(self, found: BlockList, x: Tensor, others: Sequence[Tensor]) -> None:
        """Measure what has run since the list before; then continue without a graph."""
        if found is self._lists[0]:
            self._before_blocks = self._memory.peak
            self._measure_prefix(x, others)
            self._first_moment = now()
        else:
            before = self._lists[self._lists.index(found) - 1]
            before.then = Use(self._memory.peak, 0, 0, 0, 0)
            self._see(found, found.blocks.start, [x])
        self._moment = now()
        found.enter(self._memory, x)
        torch.set_grad_enabled(False)

    def _measure_prefix(self, x: Tensor, others: Sequence[Tensor]) -> None:
        """Measure the part before the blocks if it trains."""
        trained = [t for t in (x, *others) if trainable_leaves(t)]
        self.prefix_parameters = [*dict.fromkeys(p for t in trained for p in trainable_leaves(t))]
        if trained:
            held = self._memory.live - tensor_bytes(x)
            use = try_backward(self._memory, trained, self.prefix_parameters)
            self._prefix = replace(use, held=held).in_backward(lambda most: most + held)

    def _see(self, found: BlockList, position: int, arguments: Sequence[Tensor]) -> None:
        """Measure the part that has made these ``arguments``, if it began at an earlier list."""
        seen = set(map(id, self._kept))
        fresh = [t for t in arguments if t.requires_grad and id(t) not in seen]
        parameters = [p for tensor in fresh for p in trainable_leaves(tensor)]
        others = [one for one in self._lists if one is not found]
        ends = {id(end): end for end in (*parameters, *anchors_of(others))}
        reaching = [t for t in fresh if any(id(leaf) in ends for leaf in leaves(t))]
        for one in others:
            one.note_read(leaf for tensor in reaching for leaf in leaves(tensor))
        if reaching:
            found.reached = min(found.reached, position)
            before = self._lists[self._lists.index(found) - 1]
            before.add_then(try_backward(self._memory, reaching, list(ends.values())))
            self.inner_parameters += parameters
            self._graphs += [tensor.grad_fn for tensor in reaching]

    def _leave_list(self, found: BlockList) -> None:
        """Continue with a graph that ends at the list's outputs."""
        found.leave(self._start - (self._prefix.held if self._prefix else 0))
        if found is self._lists[0]:
            found.back = 0 if self._prefix else self._memory.size(self._kept)
        torch.set_grad_enabled(True)
        self._memory.restart()
        self._memory.peak = 0  # not the bytes alive now: the last block's input will be freed

    def _head(self, outputs: list[Any]) -> Use:
        """Measure the part after the blocks; the model's output is taken out of ``outputs``."""
        first, last = self._lists[0], self._lists[-1]
        forward = max(self._memory.peak - first.base, 0)
        output = outputs.pop()
        loss, own = loss_of(output), own_loss(output)
        size = self._memory.size(t for t in tensors(output) if t is not own)
        alive = self._memory.live
        del output
        alone, outside = alive - self._memory.live, 0 if own is not None else _LOSS * size
        self._outputs: dict[str, Any] = {"output": size, "output_alone": alone, "outside": outside}
        return self._head_backward(loss, forward, first, last)

    def _head_backward(self, loss: Tensor, forward: int, first: BlockList, last: BlockList) -> Use:
        """Measure the backward of what follows the last list, and then of what is older.

        A backward pass runs the latter after the last list's blocks: it and the gradients that wait
        for it are alive in their backward.
        """
        memory, parts = self._memory, GraphParts(loss, self._moment)
        for one in self._lists:
            one.note_read((*parts.late, *parts.early))
        ends = anchors_of(self._lists) + self._head_parameters()
        alive = memory.live
        waiting, use = parts.run_late(memory, ends)
        remaining = memory.live
        if parts.is_older_than(self._first_moment):
            first.back = remaining
        later = max(remaining, first.back)
        for one in self._lists[1:]:
            one.back = later
        older = parts.run_early(memory, ends, waiting)
        if first is last:
            use = use.then(older)
        else:
            self._lists[-2].add_then(older.in_backward(lambda most: most - later))
        back = first.back
        use = replace(use, forward=forward, held=max(alive - back, 0))
        return use.in_backward(lambda most: max(most - back, 0))

    def _head_parameters(self) -> list[Tensor]:
        before = {id(parameter) for parameter in self.prefix_parameters}
        own = {
            id(p): p
            for module in outside(self._model, self._blocks)
            for p in module.parameters(recurse=False)
            if p.requires_grad and id(p) not in before and not self._switch.is_detached(p)
        }
        return list(own.values())

    def _out_of_order(self, position: int) -> str:
        return (
            f"Budget: the blocks must run once each, in their order, but "
            f"{self._blocks[position].name} did not (a shared block, or layer drop). Use an "
            "allocator without a memory budget, such as 'discounted'."
        )
