"""What a training step holds: counted, measured by blocks, and rehearsed.

How the pieces divide the work. `LiveBytes` counts the bytes and FLOPs of any PyTorch code.
`measure_step` takes one training step under it, by category; `estimate_memory` rehearses the same
step on the meta device, without memory. For an allocator that decides by costs, the blocks of a
model are run one by one, in every role that they can have, and a `MemoryReport` shows what the
present choice holds beside all modules active.
"""

from dynalora_optim._base.live_bytes import LiveBytes
from dynalora_optim.memory._rehearsal import estimate_memory
from dynalora_optim.memory._report import MemoryReport, MemoryUse
from dynalora_optim.memory._step import StepMemory, measure_step

__all__ = [
    "LiveBytes",
    "MemoryReport",
    "MemoryUse",
    "StepMemory",
    "estimate_memory",
    "measure_step",
]
