"""`DynamicAllocationOptimizer`: the one line in the training loop; it combines all the parts."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dynalora_optim._adalora import score_active_modules, score_all_modules
from dynalora_optim._assembly import Assembly, Choosing
from dynalora_optim._base.claims import claim, release
from dynalora_optim._base.collectives import check_agreement
from dynalora_optim._base.live_bytes import tensor_bytes
from dynalora_optim._base.torch_private import mark_stepped, without_modes
from dynalora_optim._base.wrappers import bare
from dynalora_optim._costing import StepCosting
from dynalora_optim._driver import ModuleDriver
from dynalora_optim._grouping import Grouping, log_waiting, owners_to_replace, replace_owners
from dynalora_optim._run_state import RunState
from dynalora_optim._saved import SavedOptimizer
from dynalora_optim._settings import described
from dynalora_optim._strangers import watch_strangers
from dynalora_optim.allocation._allocators import as_allocator
from dynalora_optim.allocation._context import Allocator
from dynalora_optim.allocation._schedules import Schedule, as_schedule
from dynalora_optim.groups._rules import GroupRule
from dynalora_optim.importance._measures import ImportanceMeasure
from dynalora_optim.importance._tracker import ImportanceTracker, as_tracker
from dynalora_optim.state._placeholders import is_rehearsal
from dynalora_optim.switching._detach import ActiveCopies
from dynalora_optim.update._backward import Backward, as_backward
from dynalora_optim.update._master_weights import MasterWeights, Rounding
from dynalora_optim.update._param_groups import flatten
from dynalora_optim.update._pause import Pause, as_pause
from dynalora_optim.update._rates import LrTime, Rates
from dynalora_optim.update._updater import Updater, evaluated
from dynalora_optim.update._wrappable import check_wrappable

_KEEP, _PLAIN = Pause(), Backward()


class DynamicAllocationOptimizer(SavedOptimizer):
    """Wraps a torch optimizer and decides every period which modules get gradients (DynaLoRA).

    It is a ``torch.optim.Optimizer`` and replaces the wrapped one everywhere: in the loop, in LR
    schedulers, in ``GradScaler``, in ``accelerator.prepare``. Its ``param_groups`` are the user's,
    the same as those of the wrapped optimizer, and its ``state`` is too (created the first time a
    module is active); the wrapped optimizer is the update rule. With all groups active, training
    gives bitwise the same result as with the wrapped optimizer alone.

    An inactive module's forward uses detached parameters: its output is unchanged, its ``grad`` is
    None, and neither momentum nor weight decay moves it. Parameters in no module group, such as a
    classification head, are always active.

    Args:
        optimizer: Any per-parameter torch optimizer over the model's parameters. The wrapper takes
            over its state, if it has any. From now on use the wrapper instead.
        model: The adapted model. Its parameters must be those of ``optimizer``.
        active: How many module groups are active at a time: a count (int), or a share (float) in
            (0, 1]; by default two thirds. It can be set at any time, and is used from the next
            reallocation on. It cannot be passed with allocators that decide this themselves
            (`Threshold`, `Budget`).
        period: The number of optimizer steps between reallocations, or a schedule such as
            ``Periodic(50, warmup=100)`` or ``Once(at=200)``.
        importance: ``"forward"`` (equation 1, p=2), ``"gradient"``, ``"sensitivity"``, a measure
            such as ``ForwardNorm(p=1)``, or an `ImportanceTracker` with its own options.
        allocator: ``"discounted"`` (equation 3), ``"topk"``, ``"threshold"``, ``"stochastic"``,
            ``"random"``, ``"round_robin"``, or an allocator object such as a `Budget`.
        groups: ``"auto"`` finds our adapters and peft's. ``"blocks"``, or `Blocks` with options,
            trains all parameters of the model's repeated blocks. Or a callable
            ``(name, module) -> group name or None``.
        always_active: Names of module groups, or patterns with ``*``, that are never inactive.
        seed: The seed of the allocator's private random numbers, a whole number >= 0.
        lr_time: ``"global"``: all modules follow the steps of the LR scheduler. ``"local"``: at its
            u-th update a module uses the rate that the scheduler had at step u. A `LocalLR`: the
            rate is a function of the module's own number of updates, without a scheduler.
        pause: What happens to the optimizer state of modules that pause, and how they return: a
            `Pause`, or only its ``state``: ``"keep"``, ``"offload"`` or ``"drop"``.
        backward: How the backward pass is run: a `Backward`.
        master_weights: Train bfloat16 (or float16) weights with float32 copies, which exist while
            their module is active. When it pauses, the weights are rounded to the ``"nearest"``
            value, or in a ``"stochastic"`` way that keeps the mean.

    A second optimizer over the same modules replaces the first, which is then closed.

    Attributes:
        tracker: The `ImportanceTracker`; call ``tracker.scores()`` at any time.
        pause: The `Pause` in use.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of range, or has no effect with the other arguments; the
            model has no adapters; or the optimizer does not hold them. Then nothing is changed.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4)  # doctest: +SKIP
        >>> optimizer = DynamicAllocationOptimizer(optimizer, model, active=16, period=50)

    Source: "Dynamic Low-Rank Module Allocation" (DynaLoRA), sections 3.1 to 3.4.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        active: float | None = None,
        period: int | Schedule = 50,
        importance: str | ImportanceMeasure | ImportanceTracker = "forward",
        allocator: str | Allocator = "discounted",
        groups: GroupRule = "auto",
        always_active: Sequence[str] = (),
        seed: int = 0,
        lr_time: LrTime = "global",
        pause: Pause | str = _KEEP,
        backward: Backward = _PLAIN,
        master_weights: Rounding | None = None,
    ) -> None:
        pause, backward = as_pause(pause), as_backward(backward)
        check_wrappable(optimizer)
        model = bare(model)
        grouping = Grouping.of(model, groups, always_active, optimizer)
        masters, rates = MasterWeights(master_weights, seed), Rates(lr_time, pause.warmup)
        updater = Updater(optimizer, rates, pause, masters, fused=backward.fused)
        rates.check(optimizer.param_groups)
        choosing = Choosing(as_allocator(allocator), as_schedule(period), active, seed)
        tracker = as_tracker(importance)
        assembly = Assembly(model, grouping, backward, choosing, tracker)
        former = owners_to_replace(model, grouping, optimizer, assembly.allocation.needs_costs)
        # Nothing outside this object has changed so far; nothing below raises.
        replace_owners(former)
        log_waiting(grouping, flatten(optimizer.param_groups))
        self.tracker, self.pause = tracker, pause
        self._model, self._group_rule, self._waiting = model, groups, grouping.waiting
        own = {"lr_time": lr_time, "pause": pause, "backward": backward}
        self._settings = described(**own, master_weights=master_weights) | assembly.settings()
        self._frozen = frozenset(group.name for group in grouping.frozen)
        self._updater, self._allocation = updater, assembly.allocation
        super().__init__(optimizer, grouping.index, updater.rule)
        self._driver, self._costing = assembly.attach()
        self._begin()

    def _begin(self) -> None:
        self._run = RunState(
            self._allocation,
            self._costing,
            self.tracker,
            self._updater.rates,
            pieces=self._pieces,
            settings=self._settings,
        )
        self._has_agreed = False  # with the other ranks, in this process
        self._take_charge()
        self._apply_allocation(probe=self.tracker.probe)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the active groups, then reallocate if the schedule says so.

        Args:
            closure: A function that evaluates the model and returns the loss; it is called once.

        Returns:
            The result of ``closure``, or None.

        Raises:
            RuntimeError: The optimizer is closed, a `Budget` has measured no batch, the optimizer
                does not hold the model's current parameters, the updates cannot be fused, or ranks
                disagree.
        """
        if self._driver.is_closed:
            raise RuntimeError("step() after close(): build a new DynamicAllocationOptimizer.")
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        self._updater.end_backward(self.param_groups)
        if not self._has_agreed:
            self._driver.check_held(flatten(self.param_groups))
        if is_rehearsal(self.param_groups, self.state):  # torch.distributed.checkpoint
            self._rehearse()
            return loss
        self._drop_provisional()
        self._relink()
        self._join_unfrozen_at(the_end=False)
        self._check_in_order()
        self._driver.before_update()
        self._drop_idle_gradients()  # idle parameters may have a gradient, but must not move
        self._costing.end_trial()
        update = partial(self._update, closure and evaluated(loss))
        due = self._allocation.advance(self._costing.watched(update, self._largest_gradient))
        if self._allocation.may_differ_between_ranks:
            check_agreement("whether to reallocate now", due, self._driver.device)
        self.tracker.end_step(self._allocation.steps)
        if due:
            self._reallocate()
        self._join_unfrozen_at(the_end=True)
        return loss

    def _join_unfrozen_at(self, *, the_end: bool) -> None:
        # With a budget it is at the end of a step: the next forward measures what has joined.
        if self._allocation.needs_costs == the_end:
            self._join_unfrozen()

    def _update(self, closure: Callable[[], Any] | None) -> set[str]:
        """Update the active groups; return the names of those that had a gradient."""
        updated, changed = self._updater.update(
            self.module_groups,
            state=self.state,
            clock=self._allocation,
            is_active=self._is_active,
            closure=closure,
        )
        self._pieces.keep(self.param_groups, changed)
        return updated

    def _largest_gradient(self) -> int:
        """Return the bytes of the gradients of the group that has the most."""
        sizes = (
            sum(tensor_bytes(p.grad) for p in group["params"] if p.grad is not None)
            for group in self.module_groups
        )
        return max(sizes, default=0)

    def _check_in_order(self) -> None:
        if not self._has_agreed:
            self._agree()
            self._has_agreed = True
        if self._allocation.needs_costs and self._allocation.costs is None:
            raise RuntimeError(
                "Budget has measured nothing: before step(), there was no training forward with a "
                "non-empty batch of the model given to DynamicAllocationOptimizer. Call that model "
                "itself (or a wrapper that calls it), in train() mode."
            )

    def _agree(self) -> None:
        self._driver.agree(self._allocation.settings())

    def _reallocate(self) -> None:
        self._driver.watch_synchronization()
        self._costing.share()
        activated = self._allocation.select(self.tracker.roll())
        self._agree()
        self._apply_allocation(probe=self.tracker.probe)
        self.pause.welcome(self.state, self._parameters_of(activated.__contains__))

    def close(self) -> None:
        """Make every module active again and remove all hooks.

        The wrapped optimizer gets the user's groups, with their current options and state. The
        record and the state can still be read; `step` now raises an error.
        """
        if not self._driver.is_closed:
            self._updater.settle(self.state, flatten(self.param_groups), (), number=0)
            self._unlink()
        _close(self._model, self._driver, self._costing, self._updater)
        mark_stepped(self)  # its schedulers go on with the wrapped optimizer
        release(self)

    def _take_charge(self) -> None:
        """Claim what this object drives; remove the hooks when this object is deleted."""
        super()._take_charge()
        self._updater.attach(self.module_groups, self._receive)
        claim(self, [self._rule.optimizer, *self._driver.modules()])
        watch_strangers()
        self.tracker.follow(self._model)
        score_active_modules(self._model)
        for module in self._driver.modules():
            ActiveCopies.of(module)
        self._driver.attach()
        self._costing.attach(self, self._updater.rule, self.pause.state)
        parts = self._model, self._driver, self._costing, self._updater
        weakref.finalize(self, _clean_up, *parts).atexit = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_rule" in state and not self._driver.is_closed:  # the modules of a copy are all active
            self._apply_allocation(probe=self._driver.is_probing)


def _close(model: nn.Module, driver: ModuleDriver, costing: StepCosting, updater: Updater) -> None:
    """Remove all hooks."""
    if driver.is_closed:  # by now another optimizer may drive the modules
        return
    for module in driver.modules():
        ActiveCopies.stop(module)
    score_all_modules(model)
    driver.close()
    costing.close()
    updater.remove()


def _clean_up(*parts: Any) -> None:
    """Close what is deleted; no method, because a finalizer of a method keeps its object alive."""
    with without_modes():  # it can be collected at any moment, while fake tensors are in use also
        _close(*parts)
