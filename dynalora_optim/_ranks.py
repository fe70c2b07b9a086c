"""What is different in the costing of a step if several ranks take it together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch.nn.parallel import DistributedDataParallel

from dynalora_optim._base.collectives import world_size
from dynalora_optim._base.torch_private import active_ddp
from dynalora_optim._base.torch_private_fsdp import has_gradients, reduces_gradients
from dynalora_optim._driver import ModuleDriver
from dynalora_optim.allocation._costs import Costs
from dynalora_optim.memory._block_meter import BlockMeter
from dynalora_optim.memory._habits import Habits
from dynalora_optim.memory._passes import Around
from dynalora_optim.memory._shapes import Measure, MeasuredShapes, Shape
from dynalora_optim.memory._together import Agreed, Together


def reduces_after(ddp: DistributedDataParallel | None) -> bool:
    """Return whether ``ddp`` reduces the gradients of the forward that it runs now."""
    return ddp is not None and bool(ddp.require_backward_grad_sync)


class Ranks:
    """Decides with the other ranks, where all run each forward at the same time."""

    def __init__(
        self, meter: BlockMeter, driver: ModuleDriver, shapes: MeasuredShapes, habits: Habits
    ) -> None:
        self._meter, self._driver, self._shapes = meter, driver, shapes
        self._together = Together(shapes, habits)

    @property
    def is_together(self) -> bool:
        """Whether all ranks run the next forward at the same time.

        They do if the model is sharded, or if DistributedDataParallel reduces the gradients after
        it; in ``no_sync()`` the number of forwards may differ.
        """
        return world_size() > 1 and (self._meter.is_sharded or reduces_after(active_ddp()))

    @property
    def may_differ(self) -> bool:
        """Whether the ranks may know different costs between two reallocations."""
        return world_size() > 1 and not self._meter.is_sharded

    def has_gradients(self) -> bool:
        """Return whether parameters have gradients now; note if they are not always reduced."""
        if not self._meter.is_sharded:
            return self._driver.has_gradients()
        model = self._meter.model
        if self._meter.reduces and not reduces_gradients(model):
            self._meter.reduces = False
            self._shapes.entries.clear()  # whole gradients take more
        return self._driver.has_gradients() or has_gradients(model)

    def agree(
        self,
        batch: tuple[Shape, int],
        around: Around,
        measure: Measure,
        fits: Callable[[Costs, Around], bool],
    ) -> Agreed:
        """Return what all ranks know of a forward.

        Args:
            batch: The shape of this rank's batch, and the number of its elements.
            around: What is alive on this rank.
            measure: Measures this rank's batch, or one that covers it.
            fits: Whether a forward of these costs fits. If not, costs of larger batches do not do.

        Raises:
            ValueError: A rank cannot measure its batch. It is raised on all ranks.
        """
        agree = partial(self._together.agree, batch, around, self._driver.device, measure)
        agreed = agree()
        if agreed.joined and not (agreed.is_exact or fits(agreed.joined, agreed.around)):
            return agree(exact=True)
        return agreed
