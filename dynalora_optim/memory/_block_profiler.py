"""Measuring what every choice of blocks costs, before the first training forward.

The model runs forward once without a graph. During this pass every block is also run by itself,
forward and backward, in each role that it can have. The bytes that it holds, and the most bytes
alive, are counted exactly (`LiveBytes`). Only one block's graph is alive at a time, so that
measuring needs the memory to train one block, and two hidden states. That is less than any budget
in which each of several blocks can train.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim._base.live_bytes import LiveBytes, tensor_bytes
from dynalora_optim._base.trees import (
    elements,
    first_tensor,
    replaced,
    tensors,
    trainable_leaves,
)
from dynalora_optim.allocation._costs import BlockCost, BlockUses, Costs, Use
from dynalora_optim.groups._blocks import Block, outside
from dynalora_optim.groups._module_group import ModuleGroup
from dynalora_optim.memory._stand_ins import (
    block_input,
    enter,
    leave,
    loss_of,
    no_autocast,
    outside_checkpoint,
    own_loss,
    undisturbed,
)
from dynalora_optim.switching._module_switch import ModuleSwitch
from dynalora_optim.switching._recompute import Recomputer

_SCALARS = 1024  # bytes that no block shows: the loss, its gradient, data of a checkpoint
# What a loss outside of the model may take, in sizes of the output: a cross entropy makes as many
# logarithms as there are logits, and as many gradients.
_LOSS = 2


class Profiler:
    """Measures the blocks in one forward pass of ``model``; see `measure`."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        groups: Sequence[Sequence[ModuleGroup]],
        switch: ModuleSwitch,
    ) -> None:
        self._model = model
        self._blocks = blocks
        self._groups = groups  # the allocated groups of each block
        self._switch = switch
        self._recomputer = Recomputer()
        self._recompute = partial(self._recomputer.recompute, among=switch.held)
        self._memory = LiveBytes()
        self._costs: list[BlockCost] = []
        self._alike: dict[str, BlockCost] = {}
        self._is_measuring = False
        self._prefix: Use | None = None
        self._arguments: list[Tensor] = []  # other arguments of blocks than their inputs
        self.prefix_parameters: list[Tensor] = []

    def measure(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        group_blocks: Sequence[int | None],
    ) -> Costs:
        """Return the costs of every choice for the batch that the model is called with.

        Gradients, buffers and random numbers are unchanged afterwards.

        Raises:
            ValueError: The blocks do not run once each, in their order.
        """
        with ExitStack() as stack:
            stack.enter_context(undisturbed(self._model))
            stack.enter_context(torch.enable_grad())
            stack.callback(self._recomputer.recompute, ())  # also after an error within a block
            self._recompute([])
            for handle in self._hooks():
                stack.callback(handle.remove)
            stack.enter_context(self._memory)
            output = [self._model(*args, **kwargs)]
            self._check_complete()
            head = self._head(output)
        return Costs(
            blocks=tuple(self._costs),
            group_blocks=tuple(group_blocks),
            pinned=frozenset(i for i in range(len(self._blocks)) if self._is_pinned(i)),
            head=head,
            forward_base=self._forward_base + _SCALARS,
            backward_base=self._backward_base + _SCALARS,
            entry=self._entry,
            head_gradients=sum(map(tensor_bytes, self._head_parameters())),
            prefix=self._prefix,
            batch=elements(args, kwargs),
            before=self._before_blocks,
            prefix_gradients=sum(map(tensor_bytes, self.prefix_parameters)),
            **self._outputs,
        )

    def _hooks(self) -> Iterator[RemovableHandle]:
        for position, block in enumerate(self._blocks):
            yield block.module.register_forward_pre_hook(
                self._before(position), with_kwargs=True, prepend=True
            )
            yield block.module.register_forward_hook(self._after(position), with_kwargs=True)

    def _before(self, position: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_measuring:
                return
            if position != len(self._costs):
                raise ValueError(self._out_of_order(position))
            x = block_input(args, kwargs)
            if position == 0:
                self._enter_blocks(x)
            self._arguments += [tensor for tensor in tensors((args, kwargs)) if tensor is not x]
            self._memory.restart()
            self._start = self._memory.live - tensor_bytes(x)

        return hook

    def _after(self, position: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            if self._is_measuring:
                return None
            self._is_measuring = True
            with outside_checkpoint(module):
                self._costs.append(self._block_cost(position, args, kwargs))
            self._is_measuring = False
            return self._leave_blocks(output) if position == len(self._blocks) - 1 else None

        return hook

    def _block_cost(
        self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCost:
        """Measure a block, or return the costs of an earlier block that looks the same."""
        below = self._memory.peak - self._start
        block = self._blocks[position].module
        parameters = [(p.shape, p.dtype, p.requires_grad) for p in block.parameters()]
        kinds = [type(module) for module in block.modules()]
        seen = (kinds, parameters, len(self._groups[position]), below)
        key = repr((*seen, self._memory.flops, self._memory.ops))
        if key not in self._alike:
            self._alike[key] = self._measure_block(position, args, kwargs, below)
        return self._alike[key]

    def _enter_blocks(self, x: Tensor) -> None:
        """Measure the part before the blocks if it trains; then continue without a graph."""
        self._before_blocks = self._memory.peak
        self._entry = self._memory.size([x])
        self._first_input = weakref.ref(x.untyped_storage())
        self.prefix_parameters = trainable_leaves(x)
        if self.prefix_parameters:
            held = self._memory.live - tensor_bytes(x)
            self._memory.restart()
            start = self._memory.live - held
            torch.autograd.grad(
                leave(x), self.prefix_parameters, retain_graph=True, allow_unused=True
            )
            self._prefix = Use(0, held, self._memory.peak - start, self._memory.flops)
        torch.set_grad_enabled(False)

    def _leave_blocks(self, output: Any) -> Any:
        """Continue with a graph that ends at this output."""
        y = first_tensor(output)
        self._forward_base = self._start - (self._prefix.held if self._prefix else 0)
        self._backward_base = 0 if self._prefix else self._memory.size(self._arguments)
        self._entry = self._entry if self._first_input() is not None else 0
        torch.set_grad_enabled(True)
        self._anchor = y.new_zeros((), requires_grad=True)
        self._memory.restart()
        self._memory.peak = 0  # not the bytes alive now: the last block's input will be freed
        return replaced(output, y, enter(self._anchor, y))

    def _head(self, outputs: list[Any]) -> Use:
        """Measure the part after the blocks; the model's output is taken out of ``outputs``."""
        forward = self._memory.peak - self._forward_base
        output = outputs.pop()
        loss, own = loss_of(output), own_loss(output)
        size = self._memory.size(t for t in tensors(output) if t is not own)
        alive = self._memory.live
        del output
        alone, outside = alive - self._memory.live, 0 if own is not None else _LOSS * size
        self._outputs: dict[str, Any] = {"output": size, "output_alone": alone, "outside": outside}
        leaves = [self._anchor, *self._head_parameters()]
        return self._backward(loss, leaves, forward, self._backward_base)

    def _measure_block(
        self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any], below: int
    ) -> BlockCost:
        groups = self._groups[position]
        block = self._blocks[position].module

        def role(*, trains: bool, passes: bool) -> BlockUses:
            self._switch.set_flags(groups, [g.name for g in groups] if trains else [])
            uses = []
            for checkpointed in (False, True):
                self._recompute([block] if checkpointed else [])
                uses.append(self._run(block, args, kwargs, passes=passes))
            self._recompute([])
            return BlockUses(*uses)

        idle = role(trains=False, passes=True)
        active = role(trains=True, passes=True)
        return BlockCost(
            lowest=role(trains=True, passes=False),
            active=active,
            idle=idle,
            below=below,
            gradients=sum(tensor_bytes(p) for p in block.parameters() if p.requires_grad),
        )

    def _run(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, passes: bool
    ) -> Use:
        """Run one block forward and backward; with ``passes`` its input requires a gradient."""
        self._memory.restart()
        start = self._memory.live
        anchor = torch.zeros((), requires_grad=True)
        # Its gradient is wanted, so that nothing cuts the graph there.
        anchor.register_hook(lambda gradient: None)  # type: ignore[no-untyped-call]
        leaves = [anchor] if passes else []
        leaves += [p for p in block.parameters() if p.requires_grad]
        with torch.enable_grad():
            loss = self._forward(block, args, kwargs, anchor if passes else None)
        held_input = tensor_bytes(block_input(args, kwargs)) if self._copy() else 0
        use = self._backward(loss, leaves, self._memory.peak - start, start)
        return dataclasses.replace(use, input=held_input)

    def _forward(
        self,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        anchor: Tensor | None,
    ) -> Tensor:
        x = block_input(args, kwargs)
        copy = x.clone()  # only the graph must hold it
        self._copy = weakref.ref(copy.untyped_storage())
        if anchor is not None:
            copy = enter(anchor.to(x), copy)
        args, kwargs = replaced((args, kwargs), x, copy)
        del copy
        return leave(first_tensor(block(*args, **kwargs)))

    def _backward(self, loss: Tensor, leaves: Sequence[Tensor], forward: int, start: int) -> Use:
        held = self._memory.live - start
        self._memory.restart()
        if not loss.requires_grad:
            return Use(forward, 0, 0, 0)
        with no_autocast():
            torch.autograd.grad(loss, leaves, torch.ones_like(loss), allow_unused=True)
        return Use(forward, held, self._memory.peak - start, self._memory.flops)

    def _is_pinned(self, position: int) -> bool:
        allocated = {id(p) for group in self._groups[position] for p in group.parameters()}
        parameters = self._blocks[position].module.parameters()
        return any(p.requires_grad and id(p) not in allocated for p in parameters)

    def _head_parameters(self) -> list[Tensor]:
        before = {id(parameter) for parameter in self.prefix_parameters}
        own = {
            id(p): p
            for module in outside(self._model, self._blocks)
            for p in module.parameters(recurse=False)
            if p.requires_grad and id(p) not in before and not self._switch.is_detached(p)
        }
        return list(own.values())

    def _check_complete(self) -> None:
        if len(self._costs) < len(self._blocks):
            raise ValueError(self._out_of_order(len(self._costs)))

    def _out_of_order(self, position: int) -> str:
        return (
            f"Budget: the blocks must run once each, in their order, but "
            f"{self._blocks[position].name} did not (a shared block, or layer drop). Use an "
            "allocator without a memory budget, such as 'discounted'."
        )
