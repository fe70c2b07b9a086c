"""The memory of a training step by category, counted while the step runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from dynalora_optim._base.live_bytes import LiveBytes, storage_bytes, tensor_bytes
from dynalora_optim._base.trees import tensors
from dynalora_optim.memory._meta import companions
from dynalora_optim.update._master_weights import MASTER

Batch: TypeAlias = "Mapping[str, Any] | Sequence[Any]"
Loss: TypeAlias = Callable[[Any], Tensor]


@dataclass(frozen=True)
class StepMemory:
    """The bytes that a training step takes. ``print(memory)`` shows the table.

    Each category has its largest value during the step. These may occur at different times, so that
    their sum can be more than the peak.

    Attributes:
        weights: Parameters, also what 4-bit weights of bitsandbytes refer to, and buffers.
        master_weights: Float32 copies of weights.
        gradients: The most bytes of gradients alive at one time.
        optimizer_state: The rest of the optimizer's state.
        activations: The most bytes of everything else in forward and backward, including gradients
            that are not yet in their parameter.
        peak: The most bytes alive at any time of forward, backward and update, including temporary
            tensors of the update, without the batch.
    """

    weights: int
    master_weights: int
    gradients: int
    optimizer_state: int
    activations: int
    peak: int

    def __str__(self) -> str:
        rows = [(f.name.replace("_", " "), getattr(self, f.name)) for f in fields(self)]
        return "\n".join(f"{name:<16}{size / 2**20:>14,.1f} MiB" for name, size in rows)


def measure_step(
    model: nn.Module, batch: Batch, optimizer: Optimizer, *, loss: Loss | None = None
) -> StepMemory:
    """Run one training step, and return the memory that it took.

    Args:
        model: A model in training mode, without gradients from earlier passes.
        batch: What the model is called with: keyword arguments, or a sequence of positional ones.
        optimizer: Any optimizer, wrapped or not. It takes a step, and gradients are set to None.
        loss: A function of the model's output; by default its ``loss``, or the output itself.

    Raises:
        ValueError: The loss is not found in the model's output.
    """
    return count_step(LiveBytes(), model, batch, optimizer, loss)


def count_step(
    memory: LiveBytes, model: nn.Module, batch: Batch, optimizer: Optimizer, loss: Loss | None
) -> StepMemory:
    """Run one training step under ``memory``, and return the memory that it took."""
    scales = chain.from_iterable(map(companions, model.parameters()))
    weights = storage_bytes(chain(model.parameters(), model.buffers(), scales))
    before = _kept(optimizer)
    with memory, _watched(model.parameters(), memory) as gradients:
        _loss(model, batch, loss).backward()  # type: ignore[no-untyped-call]
        gradients.end_interval()
        optimizer.step()
        peak = max(gradients.peak, memory.peak)
        after = _kept(optimizer)  # includes the state that a first step creates
        optimizer.zero_grad()
    masters, state = map(max, zip(before, after, strict=True))
    return StepMemory(
        weights=weights,
        master_weights=masters,
        gradients=gradients.most,
        optimizer_state=state,
        activations=gradients.most_else,
        peak=weights + sum(before) + peak,
    )


class _Gradients:
    """Counts the bytes of gradients and of all other tensors separately during a backward pass.

    The bytes of gradients change only when one arrives. Between two such times, the peak of the
    other tensors is the peak of all tensors minus a constant.
    """

    def __init__(self, memory: LiveBytes) -> None:
        self._memory = memory
        self._alive = 0
        self.most = 0
        self.most_else = 0
        self.peak = 0

    def end_interval(self) -> None:
        """Record the peak since the last call."""
        self.peak = max(self.peak, self._memory.peak)
        self.most_else = max(self.most_else, self._memory.peak - self._alive)
        self._memory.restart()

    def come(self, size: int) -> None:
        """Count a new gradient of this size, which is not yet in its parameter."""
        self._alive += size
        self.most = max(self.most, self._alive)

    def settle(self, size: int, *, is_gone: bool) -> None:
        """Record that a gradient is in its parameter, or gone: added to another, or freed."""
        self.end_interval()
        if is_gone:
            self._alive -= size


@contextmanager
def _watched(parameters: Iterable[Tensor], memory: LiveBytes) -> Iterator[_Gradients]:
    gradients = _Gradients(memory)
    handles = []
    for parameter in parameters:
        if parameter.requires_grad:
            watch = _Watch(parameter, gradients)
            handles.append(parameter.register_hook(watch.arrive))  # type: ignore[no-untyped-call]
            handles.append(parameter.register_post_accumulate_grad_hook(watch.settle))  # type: ignore[no-untyped-call]
    try:
        yield gradients
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """The hooks of one parameter."""

    def __init__(self, parameter: Tensor, gradients: _Gradients) -> None:
        self._parameter = parameter
        self._gradients = gradients
        self._had_one = False

    def arrive(self, gradient: Tensor) -> None:
        self._had_one = self._parameter.grad is not None
        self._gradients.end_interval()
        self._gradients.come(tensor_bytes(gradient))

    def settle(self, parameter: Tensor) -> None:
        size, left = tensor_bytes(parameter), parameter.grad
        # A fused update leaves None, or a stand-in of one number.
        is_used = left is None or left.untyped_storage().nbytes() < size
        self._gradients.settle(size, is_gone=self._had_one or is_used)


def _kept(optimizer: Optimizer) -> tuple[int, int]:
    """Return the bytes of the copies of weights, and of the rest of the optimizer's state."""
    entries = [item for values in optimizer.state.values() for item in values.items()]
    masters = [value for key, value in entries if key == MASTER]
    return storage_bytes(masters), storage_bytes(
        tensors([value for key, value in entries if key != MASTER])
    )


def _loss(model: nn.Module, batch: Batch, loss: Loss | None) -> Tensor:
    """Return only the loss: most loops do not keep the rest of the output after the forward."""
    output = model(**batch) if isinstance(batch, Mapping) else model(*batch)
    if loss is not None:
        return loss(output)
    found = getattr(output, "loss", output)
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise ValueError(
            f"the model returned {type(output).__name__}, which is not a loss and has none; "
            "give the model labels, or pass loss=, a function of its output."
        )
    return found
