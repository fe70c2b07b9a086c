"""Everything that the optimizer does to the modules of its model: measuring and switching them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, filterfalse

import torch
from torch import Tensor, nn

from dynalora_optim._base.claims import is_claimed
from dynalora_optim._base.collectives import check_agreement, differs, is_sharded, world_size
from dynalora_optim.allocation._choice import Choice
from dynalora_optim.groups._blocks import Block
from dynalora_optim.groups._layout import BlockLayout
from dynalora_optim.groups._module_group import ModuleGroup
from dynalora_optim.importance._tracker import ImportanceTracker
from dynalora_optim.switching._anchor import Anchor
from dynalora_optim.switching._detach import drop_copied_hooks
from dynalora_optim.switching._gradients import drop_gradients
from dynalora_optim.switching._model_hooks import ModelHooks
from dynalora_optim.switching._module_switch import ModuleSwitch, gated_groups
from dynalora_optim.switching._probe import GradientProbe
from dynalora_optim.update._spent import is_alive

logger = logging.getLogger(__name__)


class ModuleDriver:
    """Applies choices to the modules, keeps DDP synchronised, and runs the tracker.

    Args:
        model: The adapted model.
        blocks: The model's blocks; there may be none.
        groups: The allocated groups.
        frozen: Groups that are never active.
        tracker: Measures the allocated groups.
        by_blocks: Whether each group lies in one block, and a choice decides what every block
            recomputes. Then a compiled block can be idle as a whole.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        groups: Sequence[ModuleGroup],
        frozen: Sequence[ModuleGroup],
        tracker: ImportanceTracker,
        *,
        by_blocks: bool,
    ) -> None:
        self.is_closed = False
        self.switch = ModuleSwitch(blocks, holds=by_blocks)
        self._model = model
        self._blocks = blocks
        self._groups: dict[str, ModuleGroup] = {}
        self._frozen = frozen
        self._tracker = tracker
        self._by_blocks = by_blocks
        self._hooks = ModelHooks(model, blocks)
        self._probe = GradientProbe(model, self.switch, tracker)
        self._anchor = Anchor()
        self._choice = Choice(frozenset())
        self._outer: list[Tensor] = []  # what trains in no group
        self._has_diverged = False  # from the weights of other ranks
        self._has_told = False  # of active groups that the user has frozen
        self.add(groups)
        self.switch.set_flags(frozen, ())

    def attach(self) -> None:
        """Set the hooks of the model as a whole."""
        self._hooks.attach()

    def add(self, groups: Sequence[ModuleGroup]) -> None:
        """Drive ``groups`` too; they stay active until the next `apply`."""
        for module in filterfalse(is_claimed, self._model.modules()):
            drop_copied_hooks(module)
        self._groups.update((group.name, group) for group in groups)
        self._tracker.attach(groups)
        self._anchor.attach(groups)

    def replace(self, groups: Iterable[ModuleGroup]) -> None:
        """Drive these ``groups``, which hold more parameters than those of the same names."""
        for group in groups:
            self._groups[group.name] = group
            self.switch.replace(group)

    def check_same(self, groups: Iterable[ModuleGroup]) -> None:
        """Raise if one of ``groups`` has the name of a driven group, but other modules.

        Raises:
            ValueError: Modules of the driven group were removed from the model, or the rule now
                puts more modules into the group.
        """
        for group in groups:
            known = self._groups.get(group.name, group)
            if known.modules != group.modules:
                raise ValueError(
                    f"group {group.name!r} no longer has the modules that this optimizer drives "
                    "under that name; close() the optimizer and build a new "
                    "DynamicAllocationOptimizer."
                )

    def check_held(self, parameters: Iterable[Tensor]) -> None:
        """Raise unless each group has some of ``parameters``, which the optimizer updates.

        Raises:
            RuntimeError: The parameters of a group were replaced after the optimizer was built.
        """
        held = set(map(id, parameters))
        for group in self._groups.values():
            if held.isdisjoint(map(id, group.parameters())):
                raise RuntimeError(
                    f"the optimizer no longer holds the parameters of {group.name}. fully_shard "
                    "replaces them: call it before the optimizer is built, or leave it to "
                    "accelerator.prepare(model, optimizer). DeepSpeed ZeRO flattens them into "
                    "tensors that belong to no module, so that no module can be inactive: use DDP "
                    "or FSDP2 (fully_shard) instead."
                )

    def groups(self) -> list[ModuleGroup]:
        """Return the driven groups, including those that are never active."""
        return [*self._groups.values(), *self._frozen]

    def modules(self) -> Iterator[nn.Module]:
        """Yield the modules of the driven groups."""
        return (module for group in self.groups() for module in group.modules)

    @property
    def is_probing(self) -> bool:
        """Whether the next backward pass gives all modules a gradient."""
        return self._probe.is_waiting

    def apply(self, choice: Choice, *, probe: Choice | None = None) -> None:
        """Apply ``choice``; if a ``probe`` is given, apply that first, for one backward pass."""
        self._probe.close()
        self._choice = choice
        groups = list(self._groups.values())
        self.switch.apply(groups, choice)
        self.switch.set_gated(groups, self._gated(groups, choice))
        if world_size() == 1:  # with several ranks, DDP waits for frozen parameters too
            self.switch.set_gated(self._frozen, ())
        if not self.is_closed:
            self._tell_of_frozen(choice)
            idle = (group for group in groups if group.name not in choice.active)
            self._anchor.move(
                next((group for group in reversed(groups) if group.name in choice.active), None),
                [*self._frozen, *idle],
            )
        if probe:
            self._probe.open(groups, probe, choice)
        in_groups = {id(p) for group in self.groups() for p in group.parameters()}
        trained = (p for p in self._model.parameters() if p.requires_grad)
        self._outer = [p for p in trained if id(p) not in in_groups]

    def _tell_of_frozen(self, choice: Choice) -> None:
        frozen = [name for name, group in self._groups.items() if group.is_frozen]
        active = [name for name in frozen if name in choice.active]
        # All of them: another adapter of the model is in use at the moment.
        if active and len(frozen) < len(self._groups) and not self._has_told:
            self._has_told = True
            logger.warning(
                "requires_grad was set to False for every parameter of %d module group(s) that are "
                "active now, such as %s: they take the place of others, and do not train. Build a "
                "new DynamicAllocationOptimizer after you freeze modules: it leaves them out.",
                len(active),
                active[0],
            )

    def has_gradients(self) -> bool:
        """Return whether an active group, or what trains outside of all, has a gradient now."""
        for parameter in self._outer:
            if parameter.grad is not None and is_alive(parameter.grad):
                return True
        for name in self._choice.active:  # loops: a generator takes a call for each slot
            for slot in self._groups[name].slots:
                gradient = slot.parameter.grad
                if gradient is not None and is_alive(gradient):
                    return True
        return False

    def drop_gradients(self, names: Collection[str], *, arriving: bool) -> None:
        """Delete the gradients of the groups of these names, which have become inactive.

        With ``arriving`` also those that the backward of earlier forwards still brings.
        """
        for name in names:
            drop_gradients(self._groups[name].parameters())
            if arriving:
                self.switch.former.drop_arriving(self._groups[name].parameters())

    def close_probe(self) -> None:
        """Apply the choice, even if the probe's backward pass has not run yet."""
        self._probe.close()

    def _gated(self, groups: Sequence[ModuleGroup], choice: Choice) -> Collection[str]:
        # DDP waits for all parameters, so that compiled code must compute gradients for all.
        if not self._by_blocks or world_size() > 1:
            return [group.name for group in groups]
        return gated_groups(groups, choice, self._blocks)

    def layout_with(self, new: Sequence[ModuleGroup]) -> BlockLayout:
        """Return the layout of the allocated groups and the ``new`` ones."""
        return BlockLayout.of([*self._groups.values(), *new], self._blocks)

    def group(self, name: str) -> ModuleGroup:
        """Return the allocated group of this name."""
        return self._groups[name]

    def agree(self, settings: object) -> None:
        """Raise unless all ranks have the same ``settings``.

        Raises:
            RuntimeError: The ranks disagree.
        """
        self.switch.restore()
        check_agreement("the allocation", settings, self.device)

    def watch_synchronization(self) -> None:
        """Warn, once, if the weights of an active group differ between ranks that have no DDP.

        With DDP they differ only if the user wants it: in ``no_sync()``, as in Accelerate's
        LocalSGD, which averages weights instead of gradients.
        """
        first = sorted(self._choice.active)[:1]  # none while the user keeps all groups frozen
        parameters = [p for name in first for p in self._groups[name].parameters()]
        is_alone = world_size() == 1 or not parameters
        if is_alone or self._has_diverged or any(map(is_sharded, parameters)):
            return
        self._has_diverged = differs(
            torch.stack([p.detach().float().sum() for p in parameters]).sum()
        )
        if self._has_diverged and not self._anchor.has_met_ddp:
            logger.warning(
                "the ranks have different weights: nothing averages their gradients. Wrap the "
                "model in DistributedDataParallel, or prepare it with Accelerate. (If you call "
                "Trainer.evaluate() before Trainer.train(), the Trainer does not wrap the model; "
                "pass eval_on_start=True instead.)"
            )

    def before_update(self) -> None:
        """Score the gradients of the backward passes, before an optimizer step uses them."""
        self.switch.restore()
        self.switch.former.forget()
        self._probe.close()
        self._tracker.observe_step(
            g for name, g in self._groups.items() if name in self._choice.active
        )
        self._tracker.share(self.device)

    @property
    def device(self) -> torch.device:
        """The device of the allocated parameters; with none, that of the model."""
        allocated = (p for group in self._groups.values() for p in group.parameters())
        return next(chain(allocated, self._model.parameters())).device

    def close(self) -> None:
        """Make every module active and remove all hooks, once: others may drive them afterwards."""
        if self.is_closed:
            return
        self.is_closed = True
        self._probe.close()
        self.switch.close(self.groups())
        self._anchor.remove()
        self._hooks.close()
        self._tracker.close()
