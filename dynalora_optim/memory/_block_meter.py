"""Measuring what the blocks of a model cost, after checking that this is possible."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from dynalora_optim._base.collectives import has_process_group, is_fully_sharded
from dynalora_optim._base.torch_private import original
from dynalora_optim._base.torch_private_fsdp import unusual
from dynalora_optim.allocation._costs import Costs
from dynalora_optim.groups._blocks import Block, model_blocks
from dynalora_optim.groups._layout import blocks_of
from dynalora_optim.groups._module_group import ModuleGroup
from dynalora_optim.memory._replica import Replica
from dynalora_optim.memory._room import NoRoom
from dynalora_optim.memory._routes import Batch, Routes
from dynalora_optim.memory._shapes import is_padded, shape_of
from dynalora_optim.memory._sharding import Sharding
from dynalora_optim.switching._module_switch import ModuleSwitch
from dynalora_optim.switching._recompute import checkpoints_itself, is_compiled, is_reentrant


class BlockMeter:
    """Measures the costs of the blocks of ``model``; it decides nothing itself.

    Args:
        model: The adapted model.
        blocks: Its blocks.
        frozen: Groups that are never active. A copy of the model has them active at first.
        holds: Whether the user's own checkpoints of blocks are held off; see `ModuleSwitch`.

    Attributes:
        reduces: Whether every backward of a sharded model is expected to reduce the gradients; else
            each rank keeps whole ones for some time.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        frozen: Sequence[ModuleGroup] = (),
        *,
        holds: bool = False,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self._frozen = frozen
        self._holds = holds
        self.reduces = True

    def check(self, groups: Sequence[ModuleGroup]) -> None:
        """Raise unless every block can be measured, and every group lies in one.

        Raises:
            ValueError: One of them cannot; the message names the block or group, and a remedy.
        """
        if what := unusual(self.model):
            raise ValueError(
                f"Budget and memory_report() measure a copy of a model under fully_shard (FSDP2), "
                f"which must have ordinary parameters, but one is {what}; use an allocator without "
                "a memory budget, such as 'discounted', or DistributedDataParallel."
            )
        if not self.blocks:
            model_blocks(self.model, must=True)
        blocks_of(groups, self.blocks)
        for block in self.blocks:
            if original(block.module) is not block.module:
                raise ValueError(
                    f"Budget: {block.name} is wrapped by torch.compile, so that it cannot be "
                    "measured; compile the block itself, in place: block.compile()."
                )
            checkpoints = checkpoints_itself(block.module) and not self._holds
            if checkpoints and is_reentrant(block.module):
                raise ValueError(
                    f"Budget: {block.name} is checkpointed with use_reentrant=True, which keeps "
                    "the backward pass from ending at a block; enable gradient checkpointing with "
                    'gradient_checkpointing_kwargs={"use_reentrant": False}, or not at all.'
                )

    def measure(
        self,
        groups: Sequence[ModuleGroup],
        switch: ModuleSwitch,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        known: Costs | None,
        *,
        room: int | None = None,
    ) -> Costs:
        """Return the costs of every choice among ``groups`` for this batch.

        Several lists of blocks have the order of the ``known`` costs, if there are any. If this
        takes more memory than the device has, or more bytes than ``room``, a copy without data is
        measured in place of the model.

        The flags that ``switch`` has set are lost; the caller must set them again.

        Raises:
            ValueError: The model has no blocks, or blocks that cannot be measured one by one.
        """
        self.check(groups)
        switch.clear(groups)
        batch = Batch(args, kwargs)
        if self.is_sharded:
            return self._measure_replica(groups, batch, known)
        try:
            return self._measure_model(groups, switch, batch, known, room)
        except (torch.OutOfMemoryError, NoRoom) as error:
            full = error.with_traceback(None)  # whose frames hold what was measured
        switch.clear(groups)  # the module that was running has its parameters back
        try:
            return self._measure_replica(groups, batch, known)
        except Exception:
            if not isinstance(full, NoRoom):
                raise full from None
        # There is no such copy, of quantised weights say.
        return self._measure_model(groups, switch, batch, known, None)

    def _measure_model(
        self,
        groups: Sequence[ModuleGroup],
        switch: ModuleSwitch,
        batch: Batch,
        known: Costs | None,
        room: int | None,
    ) -> Costs:
        routes = Routes(self.model, self.blocks, groups, switch, room)
        with self._uncompiled(), _own_checkpoints_refused():
            costs = routes.measure(batch, known)
        self._check_prefix(groups, routes.prefix_parameters)
        return costs

    def _measure_replica(
        self, groups: Sequence[ModuleGroup], batch: Batch, known: Costs | None
    ) -> Costs:
        """Measure a copy that is not sharded and has no data, and add what sharding takes."""
        replica = Replica(self.model)
        blocks, groups = list(map(replica.block, self.blocks)), list(map(replica.group, groups))
        switch = ModuleSwitch(blocks, holds=self._holds)
        switch.set_flags(map(replica.group, self._frozen), ())
        routes = Routes(replica.model, blocks, groups, switch)
        padded = is_padded(shape_of(batch.args, batch.kwargs))
        with self._uncompiled(), _own_checkpoints_refused(), replica.running(padded=padded) as fake:
            costs = routes.measure(Batch(*fake((batch.args, batch.kwargs))), known)
        self._check_prefix(groups, routes.prefix_parameters)
        if not replica.units:
            return costs
        in_order = [blocks[place] for place in costs.positions]
        sharding = Sharding(replica, in_order, routes.prefix_parameters)
        return sharding.added_to(costs, reduces=self.reduces)

    @property
    def is_sharded(self) -> bool:
        """Whether ``fully_shard`` was called on a part of the model."""
        # Asked before each forward, so a single process does not look through the model.
        return has_process_group() and any(map(is_fully_sharded, self.model.modules()))

    def _uncompiled(self) -> AbstractContextManager[object]:
        """Return a context in which compiled blocks run in eager mode."""
        if any(is_compiled(block.module) for block in self.blocks):
            eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
            return eager
        return nullcontext()  # set_stance would import the whole compiler

    def _check_prefix(self, groups: Sequence[ModuleGroup], prefix: Iterable[Tensor]) -> None:
        before = {id(parameter) for parameter in prefix}
        for group in groups:
            if any(id(parameter) in before for parameter in group.parameters()):
                raise ValueError(
                    f"Budget: group {group.name!r} runs before the blocks, so the backward pass "
                    f"runs through all blocks while it is active. Leave it out of the adapter's "
                    f"targets, or pass always_active=[{group.name!r}] and accept that cost."
                )


@contextmanager
def _own_checkpoints_refused() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, CheckpointError) or "use_reentrant=True" in str(error):
            raise ValueError(
                "Budget: the model calls torch.utils.checkpoint on its blocks itself, so that they "
                "cannot be measured, and the budget could not decide what is recomputed. Remove "
                "these checkpoints: the budget sets its own where the memory asks for them."
            ) from error
        raise
