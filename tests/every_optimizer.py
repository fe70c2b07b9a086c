"""Every optimizer of torch, pytorch_optimizer, bitsandbytes and torchao: what wrapping it does.

`verdict` runs one of them plainly and wrapped. Of a wrapped one it asks: with all modules active,
is it the plain one, bit for bit? Is a resumed run the plain optimizer's resumed run? Does a plain
state go in and out? With a third of the modules active, do the others stay where they are, and is
a resumed run the uninterrupted one? Does a file of it load as one of the plain optimizer does? Is
the first moment set to zero where ``Pause(moments="reset_momentum")`` is not refused?
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynalora_optim import DynamicAllocationOptimizer, Pause

PART: dict[str, Any] = {"active": 2, "period": 1, "allocator": "round_robin"}
WIDTH = 64  # 64 * 64 is the least size that bitsandbytes and torchao quantise


class Layer(nn.Module):
    """A layer with a matrix, and a bias if ``bias``."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


def rule(name: str, module: nn.Module) -> str | None:
    return name if isinstance(module, Layer) else None


def network(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(bias) for _ in range(6)), nn.Linear(WIDTH, 8, bias=bias))


# Options without which an optimizer cannot be built, or does nothing in a short run.
NEEDED: dict[str, dict[str, Any]] = {
    "AdaShift": {"keep_num": 1},
    "BSAM": {"num_data": 16},
    "Ranger21": {"num_iterations": 100},
}
MATRICES = ("AdaGO", "AdaMuon", "Muon", "NorMuon", "SpectralSphere")  # for matrices only

Build = Callable[[nn.Module], Optimizer]


@dataclass(frozen=True)
class Kind:
    """One optimizer: where it is from, how it is built, and whether its step needs a closure."""

    package: str
    name: str
    make: type[Optimizer]
    options: dict[str, Any]
    bias: bool = True
    graph: bool = False  # the second derivative is needed
    muon: bool = False  # its groups say whether they are for Muon

    @property
    def label(self) -> str:
        return f"{self.package}.{self.name}"

    def build(self, model: nn.Module) -> Optimizer:
        torch.manual_seed(1)
        parameters: Any = list(model.parameters())
        if self.muon:
            parameters = [{"params": parameters, "use_muon": True}]
        return self.make(parameters, **self.options)

    def wrap(self, model: nn.Module, **options: Any) -> DynamicAllocationOptimizer:
        return DynamicAllocationOptimizer(self.build(model), model, groups=rule, **options)

    def network(self) -> nn.Sequential:
        return network(self.bias)


def run(kind: Kind, model: nn.Module, optimizer: Optimizer, steps: int, start: int = 0) -> None:
    """A plain loop; its random numbers are the same for every optimizer."""
    if callable(switch := getattr(optimizer, "train", None)):
        switch()
    for step in range(start, start + steps):
        random.seed(step)
        np.random.seed(step)  # Kron's step draws from it
        torch.manual_seed(100 + step)
        x = torch.randn(16, WIDTH)
        y = x[:, :8].sin()
        (model(x) - y).square().mean().backward(create_graph=kind.graph)
        torch.manual_seed(200 + step)
        optimizer.step()
        optimizer.zero_grad()


def copied(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(map(torch.equal, left, right))


def plain_run(kind: Kind, steps: int) -> tuple[nn.Module, Optimizer]:
    model = kind.network()
    optimizer = kind.build(model)
    run(kind, model, optimizer, steps)
    return model, optimizer


def resumed(kind: Kind, model: nn.Module, state: Any, make: Callable[..., Optimizer]) -> Any:
    """The weights after three more steps of a new optimizer that has loaded ``state``."""
    again = kind.network()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    optimizer = make(again)
    optimizer.load_state_dict(copied(state))
    run(kind, again, optimizer, 3, start=3)
    return weights(again)


def verdict(kind: Kind) -> dict[str, str]:
    """What each question is answered; a refusal is its message under ``"wrapped"``."""
    try:
        expected = weights(plain_run(kind, 6)[0])
        if not all(w.isfinite().all() for w in expected):
            return {"plain": "not finite"}
    except Exception as error:
        return {"plain": f"{type(error).__name__}: {error}".splitlines()[0]}
    try:
        model = kind.network()
        optimizer = kind.wrap(model, active=1.0)
    except (TypeError, ValueError) as error:
        return {"wrapped": str(error)}
    run(kind, model, optimizer, 6)
    answers = {"all active": _yes(equal(weights(model), expected))}
    answers.update(_of_states(kind))
    answers["idle"] = _idle(kind)
    answers["part resume"] = _part_resume(kind, expected)
    answers["first moment"] = _first_moment(kind)
    return answers


def _part_resume(kind: Kind, expected: list[Tensor]) -> str:
    """Is a resumed run the uninterrupted one, if that of the plain optimizer is?"""
    plain, inner = plain_run(kind, 3)
    try:
        if not equal(resumed(kind, plain, inner.state_dict(), kind.build), expected):
            return "plain: differs"
    except Exception as error:
        return f"plain: {type(error).__name__}"
    model = kind.network()
    optimizer = kind.wrap(model, **PART)
    run(kind, model, optimizer, 3)
    state = copied(optimizer.state_dict())
    if _loads_safely(inner.state_dict()) and not _loads_safely(state):
        return "weights_only"
    again = resumed(kind, model, state, lambda m: kind.wrap(m, **PART))
    run(kind, model, optimizer, 3, start=3)
    return _yes(equal(again, weights(model)))


def _loads_safely(state: Any) -> bool:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


def _first_moment(kind: Kind) -> str:
    """Is the first moment zero after a pause, or refused when the optimizer is built?"""
    model = kind.network()
    try:
        optimizer = kind.wrap(model, pause=Pause(moments="reset_momentum"), **PART)
    except ValueError as error:
        return _yes("sets the first moment to zero" in str(error))
    run(kind, model, optimizer, 3)  # the first two return now
    states = [optimizer.state[p] for layer in model[:2] for p in layer.parameters()]
    moments = [s[k] for s in states for k in ("exp_avg", "momentum_buffer") if k in s]
    return _yes(bool(moments) and not any(moment.any() for moment in moments))


def _of_states(kind: Kind) -> dict[str, str]:
    plain, inner = plain_run(kind, 3)
    kept = copied(inner.state_dict())
    try:
        expected = resumed(kind, plain, kept, kind.build)
    except Exception as error:
        reason = f"plain: {type(error).__name__}"
        return dict.fromkeys(("resume", "plain in", "plain out"), reason)
    model = kind.network()
    optimizer = kind.wrap(model, active=1.0)
    run(kind, model, optimizer, 3)
    questions: dict[str, Callable[[], Any]] = {
        "resume": lambda: resumed(
            kind, model, optimizer.state_dict(), lambda m: kind.wrap(m, active=1.0)
        ),
        "plain in": lambda: resumed(kind, plain, kept, lambda m: kind.wrap(m, active=1.0)),
        "plain out": lambda: resumed(kind, model, optimizer.plain_state_dict(), kind.build),
    }
    answers = {}
    for name, ask in questions.items():
        try:
            answers[name] = _yes(equal(ask(), expected))
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return answers


def _idle(kind: Kind) -> str:
    """Train with two of six layers, in turn; the others must not move, and those must."""
    model = kind.network()
    optimizer = kind.wrap(model, active=2, period=2, allocator="round_robin")
    moved = set()
    for step in range(48):  # RAdam and others begin to move after some updates only
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        idle = set(optimizer.groups) - set(optimizer.active_groups)
        try:
            run(kind, model, optimizer, 1, start=step)
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        changed = {n.split(".")[0] for n, p in model.named_parameters() if (p != before[n]).any()}
        if changed & idle:
            return "an idle module moved"
        moved |= changed
        if step > 4 and moved >= set(optimizer.groups):
            return "yes"
    return "a module never moved"


def _yes(answer: bool) -> str:
    return "yes" if answer else "differs"


def kinds() -> Iterator[Kind]:
    """All kinds of the packages that are installed."""
    for name, cls in sorted(vars(torch.optim).items()):
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer:
            yield Kind("torch", name, cls, {"lr": 0.01}, bias=name != "Muon")
    for package in ("pytorch_optimizer", "bitsandbytes", "torchao", "schedulefree"):
        try:
            yield from globals()[f"_of_{package}"]()
        except ImportError:
            continue


def _of_pytorch_optimizer() -> Iterator[Kind]:
    import pytorch_optimizer as package

    known = package.get_supported_optimizers()
    found = {cls.__name__: cls for cls in map(package.load_optimizer, known)}
    for name, cls in sorted(found.items()):
        if "torch.optim" not in cls.__module__ and "bitsandbytes" not in cls.__module__:
            yield Kind(
                "pytorch_optimizer",
                name,
                cls,
                NEEDED.get(name, {}),
                bias=name not in MATRICES,
                graph=name in ("AdaHessian", "SophiaH"),
                muon=name in MATRICES and name != "SpectralSphere",
            )


def _of_bitsandbytes() -> Iterator[Kind]:
    from bitsandbytes import optim

    for name, cls in sorted(vars(optim).items()):
        if isinstance(cls, type) and issubclass(cls, Optimizer):
            options: dict[str, Any] = {"lr": 0.01}
            if "min_8bit_size" in inspect.signature(cls.__init__).parameters:
                options["min_8bit_size"] = 16
            if "LARS" in name or "SGD" in name or "RMSprop" in name:
                options["momentum"] = 0.9
            yield Kind("bitsandbytes", name, cls, options)


def _of_torchao() -> Iterator[Kind]:
    from torchao import optim

    for name, cls in sorted(vars(optim).items()):
        if isinstance(cls, type) and issubclass(cls, Optimizer):
            yield Kind("torchao", name, cls, {"lr": 0.01})


def _of_schedulefree() -> Iterator[Kind]:
    import schedulefree

    for name, cls in sorted(vars(schedulefree).items()):
        if isinstance(cls, type) and issubclass(cls, Optimizer):
            yield Kind("schedulefree", name, cls, {"lr": 0.01})
