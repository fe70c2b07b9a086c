"""transformers: the ``Trainer``'s optimizer, a callback that reports on it, and the loss in chunks.

The Trainer builds its optimizer late: on its device, from its arguments, and after ``model_init``.
With FSDP it builds the optimizer from the model that it has prepared, and refuses a finished one.
So the Trainer is given a factory, which it calls with the model.

`chunk_loss` works with and without the Trainer.
"""

from dynalora_optim.integrations.transformers._chunk_loss import ChunkedLossHandle, chunk_loss
from dynalora_optim.integrations.transformers._trainer import (
    AllocationCallback,
    OptimizerFactory,
    dynalora_optimizer,
)

__all__ = [
    "AllocationCallback",
    "ChunkedLossHandle",
    "OptimizerFactory",
    "chunk_loss",
    "dynalora_optimizer",
]
