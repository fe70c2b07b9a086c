"""Measuring in no more memory than there is room for."""

from __future__ import annotations

from torch import nn

from dynalora_optim._base.live_bytes import LiveBytes, tensor_bytes


class NoRoom(BaseException):
    """A measurement would take more bytes than there is room for.

    It is no Exception, so that no code of a model goes on in another way.
    """


class Within(LiveBytes):  # type: ignore[no-untyped-call]
    """A counter that raises `NoRoom` before more than ``room`` bytes are alive.

    An operation tells its size only when it is over. So the counter leaves room for a tensor as
    large as the largest so far.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._largest = 0

    def _change(self, key: int, size: int) -> None:
        super()._change(key, size)
        self._largest = max(self._largest, size)
        if self.live + self._largest > self._room and not self.pauses:
            self._room = 1 << 62  # what is tidied up now may take some
            raise NoRoom


def counter(room: int | None) -> LiveBytes:
    """Return a counter that stays within ``room`` bytes; None for any number."""
    return LiveBytes() if room is None else Within(room)


def gradient_bytes(model: nn.Module) -> int:
    """Return the bytes of the gradients that a model has."""
    return sum(tensor_bytes(p.grad) for p in model.parameters() if p.grad is not None)
