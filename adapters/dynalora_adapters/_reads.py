"""Which layers a module computes with by reading their weight, instead of calling them.

``F.linear(x, self.proj.weight)`` goes past an adapter on ``proj``: the adapter has no effect, and a
merged one changes the output. The only place that shows this is the source code of the class.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType

from torch import nn

Path = tuple[str, ...]  # attribute names from the module on; EACH stands for an index
EACH = "*"
Aliases = dict[str, set[Path]]  # a local name -> the submodules that it may stand for

# Methods that read weights for another purpose than computing the output.
_NOT_FORWARD = re.compile(r"_*(init|reset|tie|resize|prune|load|save|extra_repr|get_.*embed).*")
# What is asked about a weight without computing with it, or while it is set.
_QUESTIONS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad"}
_QUESTIONS |= {"is_floating_point", "is_cuda", "is_meta", "data"}
_ASKING = {"isinstance", "hasattr", "getattr", "id", "type"}


@dataclass
class _Uses:
    """The paths whose weight is read, and those that are called, in the code of a class."""

    read: set[Path] = field(default_factory=set)
    called: set[Path] = field(default_factory=set)


def read_layers(model: nn.Module) -> dict[nn.Module, bool]:
    """Return the modules whose weight is read past them, and whether they are called as well.

    The layers of ``nn.TransformerEncoderLayer`` do not count: ``inject`` makes it call them.
    """
    found: dict[nn.Module, bool] = {}
    for parent in model.modules():
        if isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            continue
        kind: type = type(parent)
        uses = _uses(kind)
        called = {m for path in uses.called for m in _resolve(parent, path)}
        for path in uses.read:
            for module in _resolve(parent, path):
                found[module] = found.get(module, False) or module in called
    return found


@functools.cache
def _uses(kind: type) -> _Uses:
    """Look through the methods that instances of ``kind`` run. Empty if there is no source."""
    uses = _Uses()
    methods = _methods(kind)
    reading = [method for method in methods if _names_weight(method.__code__)]
    for method in reading:
        _look_through(method, uses)
    if uses.read:
        for method in methods:
            _look_through(method, uses)
    return uses


def _methods(kind: type) -> list[FunctionType]:
    """Return the methods that instances run: not those that a subclass replaces for good."""
    found: list[FunctionType] = []
    hidden: set[str] = set()
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        own = {name: inspect.unwrap(value) for name, value in vars(base).items() if callable(value)}
        for name, method in own.items():
            if not isinstance(method, FunctionType) or _NOT_FORWARD.match(name):
                continue
            if name not in hidden:
                found.append(method)
                if "super" not in method.__code__.co_names:
                    hidden.add(name)
    return found


def _names_weight(code: CodeType) -> bool:
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return "weight" in code.co_names or any(_names_weight(one) for one in inner)


@functools.cache
def _parsed(method: FunctionType) -> list[ast.FunctionDef]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError, ValueError):  # typed in, frozen or generated code
        return []
    return [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.args.args]


def _look_through(function: FunctionType, uses: _Uses) -> None:
    for method in _parsed(function):
        _look_through_tree(method, uses)


def _look_through_tree(method: ast.FunctionDef, uses: _Uses) -> None:
    names: Aliases = {method.args.args[0].arg: {()}}
    parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(method):  # breadth first: an outer loop's name is known in the inner one
        for name, paths in _aliases(node, names):
            names.setdefault(name, set()).update(paths)
    for node in ast.walk(method):
        if isinstance(node, ast.Call):
            uses.called |= _paths(node.func, names)
        elif isinstance(node, ast.Attribute) and _computes_with_weight(node, parents):
            uses.read |= _paths(node.value, names) - {()}


def _aliases(node: ast.AST, names: Aliases) -> Iterator[tuple[str, set[Path]]]:
    """Yield the local names that a statement gives to submodules, or to each one of a list."""
    if isinstance(node, ast.Assign):
        target, value = node.targets[0], node.value
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=False))
        for one, other in pairs:
            yield from _named(one, _paths(other, names))
    elif isinstance(node, (ast.For, ast.comprehension)):
        target, value = node.target, node.iter
        if isinstance(value, ast.Call) and isinstance(target, ast.Tuple) and value.args:
            target, value = target.elts[-1], value.args[-1]  # enumerate, or the last of a zip
        yield from _named(target, {(*path, EACH) for path in _paths(value, names)})


def _named(target: ast.expr, paths: set[Path]) -> Iterator[tuple[str, set[Path]]]:
    if isinstance(target, ast.Name) and paths:
        yield target.id, paths


def _paths(node: ast.expr, names: Aliases) -> set[Path]:
    """Return what ``self.a.b[i]`` may be: ("a", "b", EACH). Empty if this is something else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, set())
    if isinstance(node, (ast.Attribute, ast.Subscript)):
        last = node.attr if isinstance(node, ast.Attribute) else EACH
        return {(*path, last) for path in _paths(node.value, names)}
    return set()


def _computes_with_weight(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether this reads a weight to compute with it, not only to ask about it or to set it."""
    parent = parents[node]
    if (
        node.attr != "weight"
        or not isinstance(node.ctx, ast.Load)
        or isinstance(parent, ast.Compare)
    ):
        return False
    if isinstance(parent, ast.Attribute):
        asks = parent.attr in _QUESTIONS or parent.attr.endswith("_")  # such as div_, in place
        return not asks and isinstance(parent.ctx, ast.Load)
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id not in _ASKING
    return True


def _resolve(module: nn.Module, path: Path) -> list[nn.Module]:
    """Return the submodules at a path below ``module``."""
    found = [module]
    for name in path:
        if name == EACH:
            found = [child for one in found for child in one.children()]
        else:
            inner = [getattr(one, name, None) for one in found]
            found = [one for one in inner if isinstance(one, nn.Module)]
    return found
