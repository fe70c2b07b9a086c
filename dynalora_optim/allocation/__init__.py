"""Choosing which groups are active, and when: from scores and costs to one choice.

How the pieces divide the work. An `Allocator` chooses the groups from an `AllocationContext`, which
holds numbers only, no modules. A `Schedule` decides after which optimizer steps it chooses. The
run's ``Allocation`` counts steps and updates, calls both, keeps the `AllocationRecord`, and returns
a `Choice`: which groups train, and which blocks are recomputed. All later parts only apply it.

A `CostAware` allocator, such as `Budget`, also receives the `Costs` of all choices (measured on a
training batch) and returns a `Plan`. To write your own, wrap a `Budget`, or search the costs
yourself. With a method ``cover`` (`Covering`) yours can be in a `Bounded`, too.
"""

from dynalora_optim.allocation._allocators import (
    DiscountedStochastic,
    RoundRobin,
    Stochastic,
    Threshold,
    TopK,
    UniformRandom,
)
from dynalora_optim.allocation._bounded import Bounded
from dynalora_optim.allocation._budget import Budget
from dynalora_optim.allocation._choice import Choice
from dynalora_optim.allocation._context import (
    AllocationContext,
    Allocator,
    CostAware,
    Covering,
    Weighted,
)
from dynalora_optim.allocation._costs import BlockCost, BlockUses, Costs, Plan, Use
from dynalora_optim.allocation._loop import Loop
from dynalora_optim.allocation._record import AllocationRecord, Reallocation
from dynalora_optim.allocation._resident import Resident
from dynalora_optim.allocation._schedules import Once, Periodic, Schedule

__all__ = [
    "AllocationContext",
    "AllocationRecord",
    "Allocator",
    "BlockCost",
    "BlockUses",
    "Bounded",
    "Budget",
    "Choice",
    "CostAware",
    "Costs",
    "Covering",
    "DiscountedStochastic",
    "Loop",
    "Once",
    "Periodic",
    "Plan",
    "Reallocation",
    "Resident",
    "RoundRobin",
    "Schedule",
    "Stochastic",
    "Threshold",
    "TopK",
    "UniformRandom",
    "Use",
    "Weighted",
]
