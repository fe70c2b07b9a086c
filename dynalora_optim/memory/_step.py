"""What a training step takes, by category, counted while it is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from dynalora_optim._base.live_bytes import LiveBytes, tensor_bytes
from dynalora_optim._base.torch_private import storage_key
from dynalora_optim._base.trees import tensors
from dynalora_optim.update._master_weights import MASTER

Batch: TypeAlias = "Mapping[str, Any] | Sequence[Any]"
Loss: TypeAlias = Callable[[Any], Tensor]


@dataclass(frozen=True)
class StepMemory:
    """The bytes that a training step takes. ``print(memory)`` shows the table.

    Each category is given at its largest; the peak is that of one moment.

    Attributes:
        weights: Parameters and buffers.
        master_weights: Float32 copies of weights.
        gradients: The most gradients alive at a time.
        optimizer_state: All else that the optimizer keeps.
        activations: The most that anything else takes in forward and backward, gradients on their
            way to their parameter among it.
        peak: The most bytes alive at any moment of forward, backward and update, with what the
            update holds in passing; the batch is left out.
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
    """Take one training step, and return what it took.

    Args:
        model: In training mode, without gradients from before.
        batch: What the model is called with: keyword arguments, or a sequence of positional ones.
        optimizer: Any, wrapped or not. It takes a step, and its gradients are set to None.
        loss: The loss of what the model returns; by default its ``loss``, or the tensor itself.

    Raises:
        ValueError: There is no telling which part of the output is the loss.
    """
    return count_step(LiveBytes(), model, batch, optimizer, loss)


def count_step(
    memory: LiveBytes, model: nn.Module, batch: Batch, optimizer: Optimizer, loss: Loss | None
) -> StepMemory:
    """Take one training step under ``memory``, and return what it took."""
    weights = _size(chain(model.parameters(), model.buffers()))
    before = _kept(optimizer)
    with memory, _watched(model.parameters(), memory) as gradients:
        _loss(model, batch, loss).backward()  # type: ignore[no-untyped-call]
        gradients.end_interval()
        optimizer.step()
        peak = max(gradients.peak, memory.peak)
        after = _kept(optimizer)  # with what the first step creates
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
    """Tells the bytes of gradients from those of all else, moment by moment of a backward pass.

    Gradients come and go only where one arrives, so that between two such moments the peak of the
    rest is the peak of all less a constant.
    """

    def __init__(self, memory: LiveBytes) -> None:
        self._memory = memory
        self._alive = 0
        self.most = 0
        self.most_else = 0
        self.peak = 0

    def end_interval(self) -> None:
        """Take note of the peak since the last call."""
        self.peak = max(self.peak, self._memory.peak)
        self.most_else = max(self.most_else, self._memory.peak - self._alive)
        self._memory.restart()

    def come(self, size: int) -> None:
        """A gradient of this size exists now, though in no parameter yet."""
        self._alive += size
        self.most = max(self.most, self._alive)

    def settle(self, size: int, *, is_gone: bool) -> None:
        """It has been accumulated; or it is gone, into an older one or with a fused update."""
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
        is_gone = self._had_one or parameter.grad is None
        self._gradients.settle(tensor_bytes(parameter), is_gone=is_gone)


def _kept(optimizer: Optimizer) -> tuple[int, int]:
    """The bytes of the copies of weights and of the rest of an optimizer's state."""
    entries = [item for values in optimizer.state.values() for item in values.items()]
    masters = [value for key, value in entries if key == MASTER]
    return _size(masters), _size(tensors([value for key, value in entries if key != MASTER]))


def _size(found: Iterable[Tensor]) -> int:
    """The bytes of the storages of these tensors, each once."""
    sizes = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in found}
    return sum(sizes.values())


def _loss(model: nn.Module, batch: Batch, loss: Loss | None) -> Tensor:
    """The loss alone: in most loops nothing else of the output outlives the forward pass."""
    output = model(**batch) if isinstance(batch, Mapping) else model(*batch)
    if loss is not None:
        return loss(output)
    found = getattr(output, "loss", output)
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise ValueError(
            f"the model returned {type(output).__name__}, which is no loss and has none; give it "
            "labels, or pass loss=, a function of what it returns."
        )
    return found
