"""What the project promises about itself: its README, its imports, its packaging."""

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
import torch
from tiny_models import build

import dynalora_adapters
import dynalora_optim

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SUPPORT = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")

# A folder imports only from those before it; what lies beside them may import from all.
ORDER = (
    "_base",
    "groups",
    "importance",
    "allocation",
    "switching",
    "update",
    "state",
    "memory",
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_every_python_block_of_the_readme_runs(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    tiny = build("bert")
    tiny.model.save_pretrained(tmp_path / "checkpoint")
    rows = [{name: value[i] for name, value in tiny.batch.items()} for i in range(4)]
    namespace = {
        "checkpoint": str(tmp_path / "checkpoint"),
        "loader": [tiny.batch] * 3,
        "dataset": rows * 2,
    }
    (tmp_path / "out").mkdir()
    python = blocks("python")
    assert len(python) == 11
    if not trainer_hands_over_the_model():
        python = [source for source in python if "dynalora_optimizer" not in source]
    for source in python:
        exec(compile(source, "README.md", "exec"), namespace)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left - {"trainer"} == {"adapter", "heatmap.png", "record.json", "run.pt"}
    if trainer_hands_over_the_model():
        left = {path.name for path in (tmp_path / "out" / "trainer").iterdir()}
        assert left >= {"allocation.json", "allocation.png"}


def trainer_hands_over_the_model() -> bool:
    """Whether this version of transformers knows factories of optimizers; 5.0 does not."""
    from transformers import Trainer

    return "factory" in inspect.getsource(Trainer.create_optimizer)


def test_the_one_changed_line_is_the_one_that_runs():
    (diff,) = blocks("diff")
    old, new = (line[1:] for line in diff.splitlines())
    model = dynalora_adapters.inject(
        build("bert").model,
        dynalora_adapters.LoRAConfig(rank=2, alpha=4, targets=["query", "value"]),
    )
    names = {
        "torch": torch,
        "model": model,
        "DynamicAllocationOptimizer": dynalora_optim.DynamicAllocationOptimizer,
    }
    exec(old, names)
    assert type(names["optimizer"]) is torch.optim.AdamW
    exec(new, names)
    assert len(names["optimizer"].active_groups) == 3
    assert old.removeprefix("optimizer = ") in new


def test_every_command_of_the_readme_exists():
    tox = (ROOT / "tox.ini").read_text(encoding="utf-8")
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    commands = [line for block in blocks("console") for line in block.splitlines()]
    assert commands == [
        "pip install tox && tox run -e quickstart",
        "pip install tox && tox run",
        "pip install .",  # what tox does with the wheel
    ]
    for command in commands[:2]:
        assert command in ci.splitlines(), "CI runs the README's own commands"
    assert "[testenv:quickstart]" in tox
    assert "python examples/quickstart.py" in tox
    for script in re.findall(r"python ((?:examples|benchmarks)/\S+\.py)", README):
        assert (ROOT / script).is_file()


def test_every_row_of_the_support_table_names_a_test():
    rows = [line for line in SUPPORT.splitlines() if line.startswith("| ")][1:]
    for row in rows:
        ((file, test),) = re.findall(r"`(test_\w+)::(test_\w+)` \|$", row)
        assert f"\ndef {test}(" in (ROOT / "tests" / f"{file}.py").read_text("utf-8"), row
    assert len(rows) > 30


@pytest.mark.parametrize(
    "module",
    ["dynalora_optim", "dynalora_adapters", "dynalora_optim.integrations.transformers"],
)
def test_every_public_name_is_documented(module):
    if "." in module:
        pytest.importorskip(module.rsplit(".", 1)[1])
    package = importlib.import_module(module)
    assert package.__doc__
    for name in package.__all__:
        thing = getattr(package, name)
        assert name in README, f"{name} is not in the README"
        assert inspect.getdoc(thing), name
        if inspect.isclass(thing):
            for method, value in vars(thing).items():
                if not method.startswith("_") and (callable(value) or isinstance(value, property)):
                    assert inspect.getdoc(value), f"{name}.{method}"


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
        if path.parent.name == "integrations":
            continue
        lazy = {"matplotlib"} if path.stem == "_plot" else set()
        assert {name.split(".")[0] for name in imports_of(path)} <= allowed | lazy, path


def integrations() -> list[Path]:
    return sorted((Path(dynalora_optim.__file__).parent / "integrations").glob("*.py"))


def test_each_integration_imports_its_library_and_nothing_imports_an_integration():
    libraries = {"__init__": set(), "ddp": {"torch"}, "transformers": {"torch", "transformers"}}
    assert {path.stem for path in integrations()} == set(libraries)
    for path in integrations():
        found = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names)
        assert found - {"dynalora_optim"} == libraries[path.stem], path
    for path in [*sources(dynalora_optim), *sources(dynalora_adapters)]:
        assert not any(name.startswith("dynalora_optim.integrations") for name in imports_of(path))


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
    assert "dynalora_optim/integrations/transformers.py" in files
    assert any(file.endswith("licenses/LICENSE") for file in files)
