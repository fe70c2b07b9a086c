"""Which layers a module computes with by reading their weight, instead of calling them.

``F.linear(x, self.proj.weight)`` goes past an adapter on ``proj``: the adapter has no effect, and a
merged one changes the output. The only place that shows this is the source code of the class.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from dataclasses import dataclass, field
from types import CodeType, FunctionType

from torch import nn

Path = tuple[str, ...]  # attribute names from the module on; EACH stands for an index
EACH = "*"

# Methods that read weights for another purpose than computing the output.
_NOT_FORWARD = {"__init__", "_init_weights", "reset_parameters", "init_weights", "tie_weights"}
_NOT_FORWARD |= {"get_input_embeddings", "get_output_embeddings", "extra_repr"}
# What is asked about a weight without computing with it.
_QUESTIONS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad"}
_QUESTIONS |= {"is_floating_point", "is_cuda", "is_meta"}
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
    hidden = set(_NOT_FORWARD)
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        own = {name: inspect.unwrap(value) for name, value in vars(base).items() if callable(value)}
        for name, method in own.items():
            if isinstance(method, FunctionType) and name not in hidden:
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
    names: dict[str, Path] = {method.args.args[0].arg: ()}
    parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(method):  # breadth first: an outer loop's name is known in the inner one
        names.update(_aliases(node, names))
    for node in ast.walk(method):
        if isinstance(node, ast.Call):
            if path := _path(node.func, names):
                uses.called.add(path)
        elif isinstance(node, ast.Attribute) and node.attr == "weight":
            path = _path(node.value, names)
            if path and _computes(node, parents):
                uses.read.add(path)


def _aliases(node: ast.AST, names: dict[str, Path]) -> dict[str, Path]:
    """Return the local name that a statement gives to a submodule, or to each one of a list."""
    given: tuple[ast.expr, ast.expr, Path]
    if isinstance(node, ast.Assign):
        given = node.targets[0], node.value, ()
    elif isinstance(node, (ast.For, ast.comprehension)):
        given = node.target, node.iter, (EACH,)
    else:
        return {}
    name, value, each = given
    path = _path(value, names)
    return {name.id: (*path, *each)} if path and isinstance(name, ast.Name) else {}


def _path(node: ast.expr, names: dict[str, Path]) -> Path | None:
    """Return the path of ``self.a.b[i]``: ("a", "b", EACH). None if this is something else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, (ast.Attribute, ast.Subscript)):
        inner = _path(node.value, names)
        last = node.attr if isinstance(node, ast.Attribute) else EACH
        return None if inner is None else (*inner, last)
    return None


def _computes(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether the weight is read to compute with it, not only asked about or assigned."""
    parent = parents[node]
    if not isinstance(node.ctx, ast.Load) or isinstance(parent, ast.Compare):
        return False
    if isinstance(parent, ast.Attribute):
        return parent.attr not in _QUESTIONS and isinstance(parent.ctx, ast.Load)
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
