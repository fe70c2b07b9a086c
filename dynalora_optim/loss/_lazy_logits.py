"""`LazyLogits`: logits that are computed when something asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dynalora_optim.loss._chunks import autocast_dtype, check_unchanged, versions
from dynalora_optim.loss._linear_cross_entropy import linear_cross_entropy

Step = Callable[[Tensor], Tensor]
CrossEntropy = Callable[..., Tensor]

_REDUCTIONS = {torch.argmax: 0, torch.logsumexp: 0, torch.linalg.vector_norm: 1}  # place of dim


class LazyLogits:
    """Stands for ``head(hidden)``, (..., classes), and computes it when something needs it.

    `torch.nn.functional.cross_entropy` on it is computed in chunks of rows. So are ``argmax``,
    ``logsumexp`` and norms over the classes, without gradients. Numbers that multiply or divide it,
    ``tanh`` and ``float`` are put off; a part of its rows is again a ``LazyLogits``. Any other
    operation of torch, and any attribute of a tensor, works too: it computes the logits, with the
    graph that the model's would have, and keeps them.

    Args:
        hidden: (..., features).
        head: Maps rows to logits.
        classes: The number of logits per row.
        cross_entropy: Called like `linear_cross_entropy`.
        told: Called with the name of what needs the logits, before they are computed.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: nn.Module,
        *,
        classes: int,
        cross_entropy: CrossEntropy = linear_cross_entropy,
        told: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.hidden = hidden
        self._head = head
        self._classes = classes
        self._cross_entropy = cross_entropy
        self._told = told
        self._steps: tuple[Step, ...] = ()
        self._is_wide = False  # float() was asked for, after the steps
        self._is_part = False
        self._records = torch.is_grad_enabled()
        self._autocast = autocast_dtype(hidden)
        self._versions = versions(head)
        self._tensor: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """(..., classes)."""
        return torch.Size((*self.hidden.shape[:-1], self._classes))

    @property
    def device(self) -> torch.device:
        """The device of the hidden states."""
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states, or float32 after ``float``."""
        return torch.float32 if self._is_wide else self.hidden.dtype

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return self.hidden.ndim

    @property
    def requires_grad(self) -> bool:
        """Whether the logits have a graph, or would have one."""
        sources = (self.hidden, *self._head.parameters())
        return self._records and any(source.requires_grad for source in sources)

    def tensor(self, asked_by: str = "tensor") -> Tensor:
        """Return the logits; they are computed at the first call."""
        if self._tensor is None:
            self._told(asked_by)
            with torch.set_grad_enabled(self._records), self._same_autocast():
                self._tensor = self._computed(self.hidden)
        return self._tensor

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one number of it."""
        return self.shape if dim is None else self.shape[dim]

    def float(self) -> Any:
        """Return these logits in float32."""
        if self._tensor is not None:
            return self._tensor.float()
        new = self._part(self.hidden)
        new._is_wide = True
        return new

    def contiguous(self) -> LazyLogits:
        """Return itself."""
        return self

    def reshape(self, *shape: Any) -> Any:
        """Return these logits in another shape."""
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if self._tensor is not None or sizes[-1] != self._classes:
            return self.tensor("reshape").reshape(sizes)
        return self._part(self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1]))

    view = reshape

    def split(self, size: Any, dim: int = 0) -> Any:
        """Return the parts along ``dim``."""
        if self._tensor is not None or dim % self.ndim == self.ndim - 1:
            return self.tensor("split").split(size, dim)  # type: ignore[no-untyped-call]
        parts = torch.split(self.hidden, size, dim)
        return tuple(self._part(part) for part in parts)

    def __getitem__(self, key: Any) -> Any:
        if self._tensor is not None or not _leaves_classes(key, self.ndim):
            return self.tensor("indexing")[key]
        return self._part(self.hidden[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._changeable("assignment")[key] = value

    def __len__(self) -> int:
        return len(self.hidden)

    def __repr__(self) -> str:
        return f"LazyLogits(shape={tuple(self.shape)}, computed={self._tensor is not None})"

    def __mul__(self, other: object) -> Any:
        return torch.mul(cast(Tensor, self), cast(Tensor, other))

    def __truediv__(self, other: object) -> Any:
        return torch.div(cast(Tensor, self), cast(Tensor, other))

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also the protocols of numpy and others
            raise AttributeError(name)
        operation = getattr(torch, name, None)
        if operation in _REDUCTIONS:
            return lambda *args, **kwargs: operation(self, *args, **kwargs)  # type: ignore[misc]
        return getattr(self._changeable(name) if name.endswith("_") else self.tensor(name), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Put off, reduce in chunks, or compute the logits."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        first, others = (args[0], args[1:]) if args else (None, ())
        if isinstance(first, LazyLogits) and first._tensor is None:
            if _is_pointwise(func, others, kwargs):
                return first._then(lambda logits: func(logits, *others))
            if func is F.cross_entropy and first._serves(*others, **kwargs):
                return first._loss(*others, **kwargs)
            if func in _REDUCTIONS and first._reduces(_REDUCTIONS[func], others, kwargs, func):
                return first._reduced(lambda logits: func(logits, *others, **kwargs))
        return func(*_real(args, name), **_real(dict(kwargs), name))

    def _same_autocast(self) -> AbstractContextManager[object]:
        """Compute as the model's forward would have, also after it."""
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.hidden.device.type, self._autocast)

    def _computed(self, hidden: Tensor) -> Tensor:
        check_unchanged(self._head, self._versions)
        logits = self._stepped(self._head(hidden))
        return logits.float() if self._is_wide else logits

    def _stepped(self, logits: Tensor) -> Tensor:
        for step in self._steps:
            logits = step(logits)
        return logits

    def _then(self, step: Step) -> LazyLogits:
        new = self._part(self.hidden)
        new._steps = (*self._steps, *([Tensor.float] if self._is_wide else []), step)
        new._is_wide = new._is_part = False
        return new

    def _part(self, hidden: Tensor) -> LazyLogits:
        new = LazyLogits(
            hidden,
            self._head,
            classes=self._classes,
            cross_entropy=self._cross_entropy,
            told=self._told,
        )
        new._steps, new._is_wide, new._is_part = self._steps, self._is_wide, True
        new._records = self._records and new._records
        new._autocast, new._versions = self._autocast, self._versions
        return new

    def _changeable(self, name: str) -> Tensor:
        """Return the logits to be changed in place; those of a part are not the whole's."""
        if self._is_part and self._tensor is None:
            raise RuntimeError(
                f"{name} would change a part of logits that do not exist yet; call tensor() on the "
                "logits first, and change that."
            )
        return self.tensor(name)

    def _serves(self, target: Any, weight: Any = None, **options: Any) -> bool:
        """Whether `linear_cross_entropy` computes this call of ``cross_entropy``."""
        deprecated = options.get("size_average"), options.get("reduce")
        trains = self._records and any(p.requires_grad for p in self._head.parameters())
        return (
            self.ndim == 2
            and isinstance(target, Tensor)
            and not (target.is_floating_point() or target.dtype == torch.uint8)
            and weight is None
            and deprecated == (None, None)
            and not (options.get("reduction") == "none" and trains)
        )

    def _loss(self, target: Tensor, weight: None = None, **options: Any) -> Tensor:
        known = ("ignore_index", "reduction", "label_smoothing")
        options = {name: options[name] for name in known if name in options}
        transform = self._stepped if self._steps else None
        with self._same_autocast():
            return self._cross_entropy(
                self.hidden, self._head, target, transform=transform, **options
            )

    def _reduces(self, place: int, args: Any, kwargs: Mapping[str, Any], func: object) -> bool:
        dim = kwargs.get("dim", args[place] if len(args) > place else None)
        is_last = isinstance(dim, int) and dim % self.ndim == self.ndim - 1
        keeps = kwargs.get("keepdim", len(args) > place + 1)
        return is_last and not keeps and (func is torch.argmax or not torch.is_grad_enabled())

    @torch.no_grad()
    def _reduced(self, reduce: Step, rows: int = 256) -> Tensor:
        parts = torch.split(self.hidden.reshape(-1, self.hidden.shape[-1]), rows)
        with self._same_autocast():
            reduced = [reduce(self._computed(part)) for part in parts]
        return torch.cat(reduced).view(self.shape[:-1])


def _operator(name: str) -> Callable[..., Any]:
    def compute(self: LazyLogits, *others: Any) -> Any:
        return getattr(self.tensor(name), name)(*_real(others, name))

    return compute


# Python looks operators up in the class, not by __getattr__.
_OPERATORS = ("add", "radd", "sub", "rsub", "rtruediv", "pow", "neg", "abs", "matmul")
for _name in (*_OPERATORS, "lt", "le", "gt", "ge"):
    setattr(LazyLogits, f"__{_name}__", _operator(f"__{_name}__"))


def _leaves_classes(key: Any, ndim: int) -> bool:
    """Whether an index takes whole rows."""
    keys = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(k, int | slice) or k is Ellipsis for k in keys):
        return False
    reaches_last = Ellipsis in keys or len(keys) == ndim
    return keys[-1] in (slice(None), Ellipsis) if reaches_last else True


def _is_pointwise(func: object, others: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if kwargs:
        return False
    if func is torch.tanh:
        return not others
    return func in (torch.mul, torch.div) and isinstance(others[0], int | float)


def _real(value: Any, name: str) -> Any:
    """Return ``value`` with tensors in place of every ``LazyLogits``."""
    if isinstance(value, LazyLogits):
        return value.tensor(name)
    if type(value) is dict:
        return {key: _real(item, name) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_real(item, name) for item in value)
    return value
