"""Fine-tune on a fixed budget: an optimizer that decides every period which modules get gradients.

How the pieces divide the work. Data flows one way, and each folder imports only from those before
it:

    groups -> importance -> allocation -> switching -> update -> state -> memory

* `DynamicAllocationOptimizer` wraps a torch optimizer and takes its place in the training loop.
* An `ImportanceTracker` scores the module groups with a measure (`ForwardNorm`, `GradientNorm`,
  `Sensitivity`) over a window (`Ema`).
* An allocator (`TopK`, `Threshold`, `Stochastic`, `DiscountedStochastic`, `UniformRandom`,
  `RoundRobin`) chooses who is active; `Bounded` sees to it that nobody waits too long.
* A schedule (`Periodic`, `Once`) says after which optimizer steps to choose anew.
* A `Budget` is an allocator that also decides where the backward pass ends and what it recomputes,
  from measured costs: a `MemoryReport` of `MemoryUse`, counted by `LiveBytes`.
* `Blocks` makes whole transformer blocks the groups; `lisa` and `badam` are presets of that.
* `Pause` says what becomes of the optimizer state of modules that pause, `Backward` how the
  backward pass is run, and `LocalLR` lets each module follow the learning-rate schedule at its own
  pace.
* `show_versions` prints what an issue report needs.
* `measure_step` counts what a training step takes; `estimate_memory` rehearses it without memory.
* The `AllocationRecord` keeps every `Reallocation`.

To write an allocator, a schedule or a measure of your own, see `dynalora_optim.allocation` and
`dynalora_optim.importance`.

This package imports torch and the standard library only. It recognises adapters by what they have
(`AdapterModule`), whoever wrote them.
"""

from dynalora_optim._optimizer import DynamicAllocationOptimizer
from dynalora_optim._presets import badam, lisa
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
    "estimate_memory",
    "lisa",
    "measure_step",
    "show_versions",
]
