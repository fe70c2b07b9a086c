"""What happens to the optimizer state of modules that pause, and how they return."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from dynalora_optim._base.checks import whole_number
from dynalora_optim.update._rule import UpdateRule
from dynalora_optim.update._trial import new_states, recreated

PausedState: TypeAlias = Literal["keep", "offload", "drop"]
Moments: TypeAlias = Literal["keep", "reset_momentum", "reset"]

_FIRST_MOMENTS = ("exp_avg", "momentum_buffer")  # the keys in all of torch's optimizers


@dataclass(frozen=True)
class Pause:
    """What happens to the optimizer state of a module that pauses.

    Attributes:
        state: The state while the module is inactive: ``"keep"``: it stays on the device;
            ``"offload"``: it moves to the host, and back unchanged; or ``"drop"``: it is deleted,
            and the module returns with a new one.
        moments: The moments when the module returns: ``"keep"``, ``"reset_momentum"`` (the first
            moment only), or ``"reset"``.
        warmup: When the module returns, its rate rises over n = ``warmup`` steps: 1/n, 2/n, ... 1.

    Raises:
        ValueError: A value is out of range, or ``moments`` is set for a state that is dropped.
    """

    state: PausedState = "keep"
    moments: Moments = "keep"
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.state not in get_args(PausedState):
            raise ValueError(
                f"Pause(state={self.state!r}): pass one of {', '.join(get_args(PausedState))}."
            )
        if self.moments not in get_args(Moments):
            raise ValueError(
                f"Pause(moments={self.moments!r}): pass one of {', '.join(get_args(Moments))}."
            )
        if self.state == "drop" and self.moments != "keep":
            raise ValueError(
                f"Pause(state='drop', moments={self.moments!r}): a dropped state has no moments; "
                "leave moments out."
            )
        whole_number("Pause(warmup)", self.warmup, least=0)

    def check(self, rule: UpdateRule) -> None:
        """Raise unless the state of the optimizer can be reset as ``moments`` says.

        Raises:
            ValueError: It cannot, or nothing is known of its first moment.
        """
        if self.moments == "reset":
            recreated(rule, "moments='reset'")
        elif self.moments == "reset_momentum" and (why := _no_first_moment(rule)):
            raise ValueError(
                "Pause(moments='reset_momentum') sets the first moment to zero, but "
                f"{why.format(type(rule.optimizer).__name__)}; pass 'keep', or an optimizer such "
                "as AdamW."
            )

    def welcome(self, state: MutableMapping[Tensor, Any], returning: Iterable[Tensor]) -> None:
        """Reset the state of ``returning`` parameters as ``moments`` says.

        Momentum that is kept continues in the direction from before the pause: after 100 gradients
        of 1, Adam's first step on a gradient of -1 still moves by 0.8 lr in the old direction.
        """
        for parameter in returning if self.moments != "keep" else ():
            if self.moments == "reset":
                state.pop(parameter, None)
            for key in _FIRST_MOMENTS:
                moment = state.get(parameter, {}).get(key)
                if moment is not None:
                    moment.zero_()


def _no_first_moment(rule: UpdateRule) -> str:
    """Return why the first moment of an optimizer, ``{}``, cannot be reset; "" if it can."""
    try:
        states = list(new_states(rule))
    except Exception as error:
        return f"that of {{}} is not known: the update of a copy raised {type(error).__name__}"
    for state in states:
        moments = [state[key] for key in _FIRST_MOMENTS if state.get(key) is not None]
        if not moments:
            names = ", ".join(sorted(map(str, state))) or "nothing"
            return f"that of {{}} is not known: its state has {names}"
        for moment in moments:
            if type(moment) is not Tensor or not moment.is_floating_point():
                return f"{{}} keeps it as a {type(moment).__name__}, not as a plain tensor"
            if not moment.any():
                return "that of {} is always zero with these options"
    return ""


def as_pause(pause: object) -> Pause:
    """Return ``pause`` itself; a string is short for ``Pause(state=...)``.

    Raises:
        TypeError: ``pause`` is neither a `Pause` nor a string.
        ValueError: ``pause`` is an unknown string.
    """
    if isinstance(pause, Pause):
        return pause
    if isinstance(pause, str):
        return Pause(state=pause)  # type: ignore[arg-type]  # checked there
    raise TypeError(
        f"pause={pause!r} is neither a Pause nor one of {', '.join(get_args(PausedState))}."
    )
