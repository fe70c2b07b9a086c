"""What the project promises about itself: its imports, sizes, interface and packaging."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

import dynalora_adapters
import dynalora_optim

ROOT = Path(__file__).parent.parent

# A folder imports only from those before it; what lies beside them may import from all.
ORDER = (
    "_base",
    "loss",
    "groups",
    "importance",
    "allocation",
    "switching",
    "update",
    "state",
    "memory",
)


def imports_of(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.append(node.module or "")
    return found


def sources(package) -> list[Path]:
    return sorted(Path(package.__file__).parent.rglob("*.py"))


def folder_of(parts: list[str]) -> int:
    """The place of a module in the order, by its dotted path within the package."""
    return ORDER.index(parts[0]) if parts and parts[0] in ORDER else len(ORDER)


def test_imports_go_one_way():
    root = Path(dynalora_optim.__file__).parent
    folders = {path.name for path in root.iterdir() if (path / "__init__.py").is_file()}
    assert folders == {*ORDER, "integrations"}
    for path in sources(dynalora_optim):
        place = folder_of(list(path.relative_to(root).parts[:-1]))
        for name in imports_of(path):
            package, *parts = name.split(".")
            if package == "dynalora_optim" and parts:
                assert folder_of(parts) <= place, f"{path.relative_to(root)} imports {name}"


def import_graph(package) -> dict[str, set[str]]:
    root = Path(package.__file__).parent
    names = {}
    for path in sources(package):
        parts = [package.__name__, *path.relative_to(root).with_suffix("").parts]
        names[".".join(parts).removesuffix(".__init__")] = path
    return {
        name: {found for found in imports_of(path) if found in names}
        for name, path in names.items()
    }


@pytest.mark.parametrize("package", [dynalora_optim, dynalora_adapters])
def test_no_module_imports_itself_in_a_circle(package):
    graph = import_graph(package)
    while graph:
        leaves = {name for name, imported in graph.items() if not imported}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: imported - leaves for name, imported in graph.items() if name not in leaves}


@pytest.mark.parametrize(
    ("package", "allowed"),
    [(dynalora_optim, {"torch"}), (dynalora_adapters, {"torch", "safetensors"})],
    ids=["optim", "adapters"],
)
def test_packages_import_what_they_may(package, allowed):
    allowed = allowed | {package.__name__} | set(sys.stdlib_module_names)
    for path in sources(package):
        if "integrations" in path.parts:
            continue
        lazy = {"matplotlib"} if path.stem == "_plot" else set()
        assert {name.split(".")[0] for name in imports_of(path)} <= allowed | lazy, path


INTEGRATIONS = Path(dynalora_optim.__file__).parent / "integrations"


def integrations() -> dict[Path, str]:
    """The files of the integrations, each with the name of its integration."""
    files = sorted(INTEGRATIONS.rglob("*.py"))
    return {path: path.relative_to(INTEGRATIONS).with_suffix("").parts[0] for path in files}


def test_each_integration_imports_its_library_and_nothing_imports_an_integration():
    libraries = {"__init__": set(), "ddp": {"torch"}, "transformers": {"torch", "transformers"}}
    assert set(integrations().values()) == set(libraries)
    for path, name in integrations().items():
        found = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names)
        used = found - {"dynalora_optim"} - {"liger_kernel"}  # that one is asked for by an option
        assert used <= libraries[name], path
    for path in [*sources(dynalora_optim), *sources(dynalora_adapters)]:
        own = f"dynalora_optim.integrations.{integrations().get(path)}"
        for name in imports_of(path):
            assert not name.startswith("dynalora_optim.integrations") or name.startswith(own)


@pytest.mark.parametrize(
    "folder", ["dynalora_optim", "adapters/dynalora_adapters", "examples", "benchmarks"]
)
def test_files_have_at_most_300_lines_and_functions_40(folder):
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 40, f"{path}:{node.lineno}: {node.name} has {lines} lines"


@pytest.mark.parametrize("package", [dynalora_optim, dynalora_adapters])
def test_no_two_files_of_a_package_have_the_same_name(package):
    """``_x`` and ``x`` count as the same name."""
    names = [path.stem.lstrip("_") for path in sources(package) if path.stem != "__init__"]
    assert {name for name in names if names.count(name) > 1} == set()


def test_the_constructor_has_at_most_14_parameters():
    assert len(inspect.signature(dynalora_optim.DynamicAllocationOptimizer).parameters) <= 14


@pytest.mark.parametrize("name", ["allocation", "importance", "loss", "memory"])
def test_each_public_folder_has_prose_and_an_export_list(name):
    folder = importlib.import_module(f"dynalora_optim.{name}")
    title, _, prose = inspect.getdoc(folder).partition("\n\n")
    assert title.endswith(".")
    assert prose.count(".") >= 3, "sentences on how the pieces divide the work"
    assert folder.__all__
    for exported in folder.__all__:
        assert not exported.startswith("_")
        assert inspect.getdoc(getattr(folder, exported))


def test_the_distribution_has_two_typed_packages_and_two_dependencies():
    requires = [r for r in metadata.requires("dynalora-optim") or [] if "extra ==" not in r]
    assert sorted(re.split(r"[^\w-]", r)[0] for r in requires) == ["safetensors", "torch"]
    assert metadata.metadata("dynalora-optim")["License-Expression"] == "Apache-2.0"
    for package in (dynalora_optim, dynalora_adapters):
        assert (Path(package.__file__).parent / "py.typed").is_file()


@pytest.mark.skipif("DYNALORA_TEST_INSTALLED" not in os.environ, reason="set by tox")
def test_the_built_wheel_is_what_is_tested():
    for package in (dynalora_optim, dynalora_adapters):
        assert not Path(package.__file__).is_relative_to(ROOT / package.__name__)
        assert "site-packages" in package.__file__
    files = {str(file) for file in metadata.files("dynalora-optim") or []}
    packages = {file.split("/")[0] for file in files if file.endswith(".py")}
    assert packages == {"dynalora_optim", "dynalora_adapters"}
    assert "dynalora_optim/integrations/transformers/__init__.py" in files
    assert any(file.endswith("licenses/LICENSE") for file in files)
