"""Running one block by itself, forward and backward, in each role that it can have."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynalora_optim._base.live_bytes import LiveBytes, tensor_bytes
from dynalora_optim._base.trees import first_tensor, replaced
from dynalora_optim.allocation._costs import BlockCost, BlockUses, Use
from dynalora_optim.groups._module_group import ModuleGroup
from dynalora_optim.memory._made_gradients import MadeGradients
from dynalora_optim.memory._routing import Routing, worst
from dynalora_optim.memory._stand_ins import block_input, enter, leave, no_autocast
from dynalora_optim.switching._module_switch import ModuleSwitch
from dynalora_optim.switching._recompute import Recomputer

_SCALARS = 1024  # bytes of scalars, which a measurement leaves too


@dataclass(frozen=True)
class Run:
    """What one run of a block takes.

    Attributes:
        use: The memory and the FLOPs.
        gradients: The bytes of the gradients that were found.
        stays: The bytes that the backward leaves alive until the graph is dropped, which is after
            the backward of all blocks: a function written in Python may keep tensors in attributes
            of its own, where torch does not free them (bitsandbytes' 8-bit layers do).
    """

    use: Use
    gradients: int = 0
    stays: int = 0


@dataclass(frozen=True)
class Call:
    """How the model calls a block.

    Attributes:
        args: The positional arguments.
        kwargs: The keyword arguments.
        shared: The other arguments than its input that require a gradient, such as the output of an
            encoder.
        is_reached: Whether the gradient goes on below the block, whichever blocks train.
        input_passes: If so, whether it does through the block's input.
        is_last: Whether no later block gets the shared arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shared: Sequence[Tensor] = ()
    is_reached: bool = False
    input_passes: bool = True
    is_last: bool = True


class BlockRunner:
    """Measures blocks with ``memory``; blocks that look the same are measured once."""

    def __init__(self, memory: LiveBytes, switch: ModuleSwitch) -> None:
        self.memory = memory
        self._switch = switch
        self._recomputer = Recomputer()
        self._recompute = partial(self._recomputer.recompute, among=switch.held)
        self.routing = Routing()
        self._chooses = False  # whether the block that is measured chooses among experts
        self._stays = 0  # the most that a run of this block has left alive
        self._alike: dict[str, tuple[BlockCost, int]] = {}

    def begin(self) -> None:
        """Recompute no block, also none that the user has checkpointed."""
        self._recompute([])

    def end(self) -> None:
        """Leave the user's own checkpoints as they were."""
        self._recomputer.recompute(())

    def cost(
        self, block: nn.Module, groups: Sequence[ModuleGroup], call: Call, below: int
    ) -> tuple[BlockCost, int]:
        """Return the costs of ``block``, whose forward without a graph has taken ``below`` bytes.

        Also return the bytes that its backward leaves alive until the whole graph is dropped. The
        numbers of operations since the last restart of the memory tell forwards apart.
        """
        parameters = [(p.shape, p.dtype, p.requires_grad) for p in block.parameters()]
        kinds = [type(module) for module in block.modules()]
        reached: tuple[object, ...] = ()  # of other blocks these differences make none
        if call.is_reached:
            shapes = [tensor.shape for tensor in call.shared]
            reached = call.input_passes, shapes, call.is_last or not shapes
        self._chooses = self.routing.choices > 0
        seen = (kinds, parameters, len(groups), below, call.is_reached, reached)
        key = repr((*seen, self.memory.flops, self.memory.ops))
        if key not in self._alike:
            self._stays = 0
            self._alike[key] = self._measured(block, groups, call, below), self._stays
        return self._alike[key]

    def _measured(
        self, block: nn.Module, groups: Sequence[ModuleGroup], call: Call, below: int
    ) -> BlockCost:
        def role(*, trains: bool, passes: bool) -> BlockUses:
            self._switch.set_flags(groups, [g.name for g in groups] if trains else [])
            full = self._run(block, call, passes=passes)
            self._recompute([block])
            checkpointed = self._run(block, call, passes=passes)
            self._recompute([])
            return BlockUses(full, checkpointed)

        idle = role(trains=False, passes=True)
        active = role(trains=True, passes=True)
        lowest = active if call.is_reached else role(trains=True, passes=False)
        beside = self._beside(block, call, active)
        return BlockCost(
            lowest=dataclasses.replace(lowest, beside=beside),
            active=dataclasses.replace(active, beside=beside),
            idle=idle,
            below=below,
            gradients=sum(tensor_bytes(p) for p in block.parameters() if p.requires_grad),
        )

    def _run(self, block: nn.Module, call: Call, *, passes: bool) -> Use:
        """Run one block forward and backward; with ``passes`` its input requires a gradient."""
        found = self._once(block, call, passes=passes)
        if not self._chooses:
            return found.use
        with self.routing.even():
            even = self._once(block, call, passes=passes)
        return worst(found.use, even.use, max(even.gradients - found.gradients, 0))

    def _beside(self, block: nn.Module, call: Call, active: BlockUses) -> int:
        """Return the bytes that the active block holds only if it can still be recomputed.

        These are beside what it is recomputed from: layers may keep more for a backward that may
        recompute them, such as the LoRA layers of `dynalora_adapters`.
        """
        self._recompute([], keeping=[block])
        held = self._held(block, call)
        if self._chooses:
            with self.routing.even():
                held = max(held, self._held(block, call))
        self._recompute([])
        return max(held - active.releasable.full.held, 0)

    def _held(self, block: nn.Module, call: Call) -> int:
        """Return the bytes that the block holds after its forward; its input needs a gradient."""
        start = self.memory.live
        with torch.enable_grad():
            losses = self._forward(block, call, wanted(torch.zeros((), requires_grad=True)))
        return self.memory.live - start if losses else 0

    def _once(self, block: nn.Module, call: Call, *, passes: bool) -> Run:
        self.memory.restart()
        start = self.memory.live
        anchor = wanted(torch.zeros((), requires_grad=True))
        leaves = [anchor] if passes else []
        leaves += [p for p in block.parameters() if p.requires_grad]
        with torch.enable_grad():
            losses = self._forward(block, call, anchor if passes else None)
        size = tensor_bytes(block_input(call.args, call.kwargs))
        run = backward(self.memory, losses, leaves, self.memory.peak - start, start)
        self._stays = max(self._stays, run.stays)
        use = dataclasses.replace(run.use, input=size if self._held_input else 0)
        return dataclasses.replace(run, use=use)

    def _forward(self, block: nn.Module, call: Call, anchor: Tensor | None) -> list[Tensor]:
        """Return a scalar for the output, and one for what later blocks make of each argument."""
        x = block_input(call.args, call.kwargs)
        tree: Any = (call.args, call.kwargs)
        gotten = []
        for tensor in call.shared:
            new = tensor.detach()
            if anchor is not None and call.is_reached:
                new = enter(anchor.to(tensor), new)
                gotten.append(new)
            tree = replaced(tree, tensor, new)
        copy = x.detach().clone()  # only the graph must hold it
        held = weakref.ref(copy.untyped_storage())
        if anchor is not None and (call.input_passes or not call.is_reached):
            copy = enter(anchor.to(x), copy)
        args, kwargs = replaced(tree, x, copy)
        del copy, tree
        losses = [leave(first_tensor(block(*args, **kwargs)))]
        del args, kwargs
        self._held_input = held() is not None
        # In a backward pass later blocks come first, and their gradients wait for this one's.
        return losses if call.is_last else [*losses, *map(leave, gotten)]


def wanted(anchor: Tensor) -> Tensor:
    """Return ``anchor`` with a hook: its gradient is wanted, so that nothing cuts the graph."""
    anchor.register_hook(lambda gradient: None)  # type: ignore[no-untyped-call]
    return anchor


def backward(
    memory: LiveBytes, losses: Sequence[Tensor], leaves: Sequence[Any], forward: int, start: int
) -> Run:
    """Run the backward of ``losses``; return what it takes beyond the ``start`` bytes."""
    held = memory.live - start
    losses = [loss for loss in losses if loss.requires_grad]
    if not losses or not leaves:
        return Run(Use(forward, 0, 0, 0, 0))
    with no_autocast(), MadeGradients(memory, leaves) as gradients:
        ones = [torch.ones_like(loss) for loss in losses]
        torch.autograd.grad(losses, leaves, ones, allow_unused=True)
    use = Use(forward, held, gradients.kept - start, gradients.spent - start, memory.flops)
    stays = memory.live - start  # the graph is alive: it has not freed these
    return Run(use, gradients.made, stays if stays > _SCALARS else 0)
