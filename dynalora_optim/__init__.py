"""Fine-tune on a fixed budget: an optimizer that decides every period which modules get gradients.

How the pieces divide the work. Data flows one way, and each folder imports only from folders before
it in this list:

    loss -> groups -> importance -> allocation -> switching -> update -> state -> memory

* `DynamicAllocationOptimizer` wraps a torch optimizer and replaces it in the training loop.
* An `ImportanceTracker` scores the module groups with a measure (`ForwardNorm`, `GradientNorm`,
  `Sensitivity`) over a window (`Ema`).
* An allocator (`TopK`, `Threshold`, `Stochastic`, `DiscountedStochastic`, `UniformRandom`,
  `RoundRobin`) chooses which groups are active; `Bounded` limits how long a group is inactive.
* A schedule (`Periodic`, `Once`) decides after which optimizer steps to choose again.
* A `Budget` is an allocator that also decides where the backward pass ends and which blocks are
  recomputed, from measured costs. A `MemoryReport` of two `MemoryUse` shows these costs.
* `Blocks` makes whole transformer blocks the groups; `blocks_on_budget`, `lisa` and `badam` are
  presets that use it.
* `Pause` sets what happens to the optimizer state of modules that pause, `Backward` sets how the
  backward pass is run, and `LocalLR` lets each module follow the learning-rate schedule at its own
  pace.
* `linear_cross_entropy` computes the loss of a language model without all of its logits.
* `show_versions` prints what an issue report needs.
* `LiveBytes` counts the memory of any code, `measure_step` that of a training step;
  `estimate_memory` predicts it without allocating the memory.
* The `AllocationRecord` keeps every `Reallocation`.

To write your own allocator, schedule or measure, see `dynalora_optim.allocation` and
`dynalora_optim.importance`.

This package imports only torch and the standard library. It recognises adapter layers of any
library by their attributes (`AdapterModule`).
"""

from dynalora_optim._optimizer import DynamicAllocationOptimizer
from dynalora_optim._presets import badam, blocks_on_budget, lisa
from dynalora_optim._versions import show_versions
from dynalora_optim.allocation import (
    AllocationContext,
    AllocationRecord,
    Allocator,
    Bounded,
    Budget,
    DiscountedStochastic,
    Once,
    Periodic,
    Reallocation,
    RoundRobin,
    Schedule,
    Stochastic,
    Threshold,
    TopK,
    UniformRandom,
)
from dynalora_optim.groups._module_group import AdapterModule
from dynalora_optim.groups._rules import Blocks
from dynalora_optim.importance import (
    Ema,
    ForwardMeasure,
    ForwardNorm,
    ForwardPass,
    GradientMeasure,
    GradientNorm,
    ImportanceTracker,
    Sensitivity,
)
from dynalora_optim.loss import linear_cross_entropy
from dynalora_optim.memory import (
    LiveBytes,
    MemoryReport,
    MemoryUse,
    StepMemory,
    estimate_memory,
    measure_step,
)
from dynalora_optim.update._backward import Backward
from dynalora_optim.update._pause import Pause
from dynalora_optim.update._rates import LocalLR

__all__ = [
    "AdapterModule",
    "AllocationContext",
    "AllocationRecord",
    "Allocator",
    "Backward",
    "Blocks",
    "Bounded",
    "Budget",
    "DiscountedStochastic",
    "DynamicAllocationOptimizer",
    "Ema",
    "ForwardMeasure",
    "ForwardNorm",
    "ForwardPass",
    "GradientMeasure",
    "GradientNorm",
    "ImportanceTracker",
    "LiveBytes",
    "LocalLR",
    "MemoryReport",
    "MemoryUse",
    "Once",
    "Pause",
    "Periodic",
    "Reallocation",
    "RoundRobin",
    "Schedule",
    "Sensitivity",
    "StepMemory",
    "Stochastic",
    "Threshold",
    "TopK",
    "UniformRandom",
    "badam",
    "blocks_on_budget",
    "estimate_memory",
    "linear_cross_entropy",
    "lisa",
    "measure_step",
    "show_versions",
]
