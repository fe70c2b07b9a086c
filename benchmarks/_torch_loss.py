"""The loss in chunks as it can be put together from torch alone, without this package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from _runs import Run
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import flop_registry, register_flop_formula


@dataclass
class TorchChunkedRun(Run):
    """Computes the loss of a peft model with torch's own ``linear_cross_entropy``.

    Attributes:
        chunk: Rows whose logits exist at one time.
    """

    chunk: int = 256

    def loss(self) -> Tensor:
        """Return the loss. What torch allocates within the operation is counted as well."""
        hidden, head, labels = before_the_head(self.model, self.batch)
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=self.chunk, chunking_method=None)
        logits = torch.empty(min(self.chunk, len(hidden)), len(head), dtype=torch.float32)
        loss: Tensor = F.linear_cross_entropy(hidden, head, labels, options=options)
        del logits  # one chunk of logits is what it allocates: a test compares it with a profile
        return loss


def before_the_head(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hidden states of a peft model, its head's weight, and each row's next token."""
    causal = model.get_base_model()
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    hidden = causal.model(**inputs).last_hidden_state.flatten(0, 1)
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten()
    return hidden, causal.lm_head.weight, labels


def is_there() -> bool:
    """Whether this torch has the function; if so, its FLOPs are counted from now on."""
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        return False
    one, options = torch.zeros(1, 1), nn.LinearCrossEntropyOptions(chunking_method=None)
    label = torch.zeros(1, dtype=torch.long)
    F.linear_cross_entropy(one, one, label, options=options)  # registers the operation
    operation = torch.ops.torch_nn._linear_cross_entropy_batch_chunked
    if operation not in flop_registry:
        register_flop_formula(operation)(_flops)
    return True


def _flops(hidden: Any, head: Any, *args: Any, **kwargs: Any) -> int:
    """Count the logits, and one product as large for each gradient that is formed with them."""
    _, for_hidden, for_head, _ = args[-4:]
    return int(2 * hidden[0] * hidden[1] * head[0] * (1 + for_hidden + for_head))
