"""Building the parts that drive a model: all checks first, then the hooks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dynalora_optim._base.checks import whole_number
from dynalora_optim._base.torch_private import original
from dynalora_optim._costing import StepCosting
from dynalora_optim._driver import ModuleDriver
from dynalora_optim._grouping import Grouping
from dynalora_optim._settings import described, text_of
from dynalora_optim.allocation._allocation import Allocation
from dynalora_optim.allocation._context import Allocator, CostAware
from dynalora_optim.allocation._schedules import Schedule
from dynalora_optim.groups._blocks import model_blocks
from dynalora_optim.groups._layout import BlockLayout
from dynalora_optim.importance._measures import GradientMeasure
from dynalora_optim.importance._tracker import ImportanceTracker
from dynalora_optim.memory._block_meter import BlockMeter
from dynalora_optim.update._backward import Backward, refusal


@dataclass(frozen=True)
class Choosing:
    """How groups are chosen: by which allocator, when, how many, and with which seed.

    Raises:
        ValueError: ``seed`` is not a whole number >= 0.
    """

    allocator: Allocator
    schedule: Schedule
    active: float | None
    seed: int

    def __post_init__(self) -> None:
        whole_number("seed", self.seed, least=0, of="")


class Assembly:
    """Checks the options of an optimizer, and then builds the parts that drive its model.

    The model does not change before `attach`.

    Args:
        model: The adapted model.
        grouping: The groups of the model.
        backward: How the backward pass is run.
        choosing: How groups are chosen.
        tracker: Scores the groups.

    Attributes:
        allocation: The allocation, with the choice for the start.

    Raises:
        TypeError: ``active`` is not a number.
        ValueError: The options cannot be combined, or need blocks that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        grouping: Grouping,
        backward: Backward,
        choosing: Choosing,
        tracker: ImportanceTracker,
    ) -> None:
        self._choosing = choosing
        allocator, groups = choosing.allocator, grouping.allocated
        needs_costs = isinstance(allocator, CostAware)
        if needs_costs and backward.checkpoint_idle:
            raise ValueError(
                f"Backward(checkpoint_idle=True) has no effect with {type(allocator).__name__}, "
                "which itself decides what to recompute; leave it out."
            )
        self._model: nn.Module = original(model)
        self._grouping = grouping
        self._recomputes = needs_costs or backward.checkpoint_idle
        if self._recomputes and not groups:
            what = type(allocator).__name__ if needs_costs else "Backward(checkpoint_idle=True)"
            raise ValueError(
                f"{what} needs the blocks of a module that trains, but requires_grad is False for "
                "every module group. Build the optimizer when one is unfrozen, or leave it out."
            )
        chosen = [*groups, *grouping.waiting]  # the latter may join later
        members = [module for group in chosen for module in group.modules]
        self._blocks = model_blocks(self._model, must=self._recomputes, members=members)
        frozen = grouping.frozen
        self._meter = BlockMeter(self._model, self._blocks, frozen, holds=needs_costs)
        if needs_costs:
            self._meter.check(groups)
        self._tracker = tracker
        self._check_tracker(backward)
        self.allocation = Allocation(
            [group.name for group in groups],
            **vars(choosing),
            waiting=len(grouping.waiting),
            layout=BlockLayout.of(groups, self._blocks) if backward.checkpoint_idle else None,
        )

    def _check_tracker(self, backward: Backward) -> None:
        self._tracker.check(self._grouping.allocated)
        if backward.fused and isinstance(self._tracker.measure, GradientMeasure):
            raise ValueError(refusal("importance= measures gradients at step()"))

    def settings(self) -> dict[str, str]:
        """Return the settings by which groups are scored and chosen, as texts."""
        tracker = self._tracker
        texts = described(
            active=self.allocation.active,
            seed=self._choosing.seed,
            period=self._choosing.schedule,
            allocator=self._choosing.allocator,
            every=tracker.every,
            probe=tracker.probe,
        )
        return {**texts, "importance": f"{text_of(tracker.measure)}, window={tracker.window!r}"}

    def attach(self) -> tuple[ModuleDriver, StepCosting]:
        """Set the hooks; return the driver of the modules, and the part that measures costs."""
        driver = ModuleDriver(
            self._model,
            self._blocks,
            self._grouping.allocated,
            self._grouping.frozen,
            self._tracker,
            by_blocks=self.allocation.needs_costs,
        )
        return driver, StepCosting(self._meter, self.allocation, driver, self._tracker)
