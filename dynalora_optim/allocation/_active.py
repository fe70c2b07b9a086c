"""How many modules are active: a count, a share, or a number that the allocator decides."""

from __future__ import annotations

from dynalora_optim.allocation._context import Allocator, uses_active

DEFAULT = 2 / 3  # the share of the paper's main experiments


class ActiveCount:
    """The optimizer's ``active``, checked against the allocator that will use it.

    Args:
        active: A whole number of modules, a share in (0, 1], or None for the default.
        allocator: The allocator, which chooses the active groups.
        modules: The number of module groups, M, with those that may join later.

    Raises:
        TypeError: ``active`` is not a number.
        ValueError: ``active`` is outside its range, or the allocator does not use it.
    """

    def __init__(self, active: float | None, allocator: Allocator, modules: int) -> None:
        self._allocator = allocator
        self._most = modules
        self._value = DEFAULT
        if active is not None:
            self.set(active, modules)
        self.check(modules)

    @property
    def value(self) -> float:
        """The count or share."""
        return self._value

    def set(self, active: float, modules: int) -> None:
        """Use ``active`` from the next selection on.

        Raises:
            TypeError: ``active`` is not a number.
            ValueError: ``active`` is outside its range, or the allocator does not use it.
        """
        if not uses_active(self._allocator):
            raise ValueError(
                f"active={active!r} has no effect with {self._allocator!r}, which itself decides "
                "how many modules are active; leave it out."
            )
        self.check(modules, active)
        self._value = active

    def check(self, modules: int, active: float | None = None) -> None:
        """Raise unless ``active`` of ``modules`` can be active; by default the current setting.

        Raises:
            TypeError: ``active`` is not a number.
            ValueError: ``active`` is outside its range, or the allocator's own check refuses it.
        """
        most = max(modules, self._most)
        count = resolve_active(self._value if active is None else active, most)
        if callable(check := getattr(self._allocator, "check", None)):
            check(count, most)

    def restore(self, active: float) -> None:
        """Set a saved value that has already been checked."""
        self._value = active

    def resolve(self, modules: int) -> int:
        """Return how many of ``modules`` are active; of those that a count lacks, none."""
        if isinstance(self._value, int):
            return min(self._value, modules)
        return resolve_active(self._value, modules) if modules else 0


def resolve_active(active: float, modules: int) -> int:
    """Return how many of ``modules`` are active: a count is returned as is, a share is rounded.

    Args:
        active: A whole number of modules, or a float share in (0, 1].
        modules: The number of module groups, M.

    Raises:
        TypeError: ``active`` is not a number.
        ValueError: ``active`` is outside its range, or nan.
    """
    if isinstance(active, bool) or not isinstance(active, (int, float)):
        raise TypeError(
            f"active={active!r} is not a number; pass a count (int) of at most {modules} modules, "
            "or a share (float) in (0, 1]."
        )
    if isinstance(active, int):
        if active > modules:
            raise ValueError(
                f"active={active} exceeds the {modules} adapter groups found in the model; pass "
                f"at most {modules}, or a fraction in (0, 1]."
            )
        if active < 1:
            raise ValueError(
                f"active={active} leaves no module to train; pass a count from 1 to {modules}, or "
                "a fraction in (0, 1]."
            )
        return active
    if not 0 < active <= 1:  # nan fails too
        raise ValueError(
            f"active={active} is not a share in (0, 1]; pass one, or a whole number (int) from 1 "
            f"to {modules}."
        )
    return max(1, round(active * modules))
