"""What the project promises about itself: its README, its imports, its packaging."""

from __future__ import annotations

import ast
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

# Each file may import from the rows above its own, never from its own row or below.
LAYERS = [
    {"_checks", "_claims", "_groups", "_scores", "_plot"},
    {"_measures", "_schedules", "_windows", "_freezing", "_param_groups", "_record", "_allocators"},
    {"_forward_hook", "_states", "_update_rule", "_starvation"},
    {"_importance", "_allocation", "_checkpoint"},
    {"_gradient_probe", "_lr"},
    {"_modules"},
    {"_optimizer"},
    {"__init__"},
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_every_python_block_of_the_readme_runs(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    tiny = build("bert")
    tiny.model.save_pretrained(tmp_path / "checkpoint")
    namespace = {"checkpoint": str(tmp_path / "checkpoint"), "loader": [tiny.batch] * 3}
    (tmp_path / "out").mkdir()
    python = blocks("python")
    assert len(python) == 8
    for source in python:
        exec(compile(source, "README.md", "exec"), namespace)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter",
        "heatmap.png",
        "record.json",
        "run.pt",
    }


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
    for script in re.findall(r"python (examples/\S+\.py)", README):
        assert (ROOT / script).is_file()


@pytest.mark.parametrize("package", [dynalora_optim, dynalora_adapters], ids=lambda p: p.__name__)
def test_every_public_name_is_documented(package):
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
    return sorted(Path(package.__file__).parent.glob("*.py"))


def test_imports_go_one_way():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    assert {path.stem for path in sources(dynalora_optim)} == set(rank)
    for path in sources(dynalora_optim):
        for name in imports_of(path):
            if name.startswith("dynalora_optim."):
                imported = name.removeprefix("dynalora_optim.")
                assert rank[imported] < rank[path.stem], f"{path.stem} imports {imported}"


@pytest.mark.parametrize(
    ("package", "allowed"),
    [(dynalora_optim, {"torch"}), (dynalora_adapters, {"torch", "safetensors"})],
    ids=["optim", "adapters"],
)
def test_packages_import_what_they_may(package, allowed):
    allowed = allowed | {package.__name__} | set(sys.stdlib_module_names)
    for path in sources(package):
        lazy = {"matplotlib"} if path.stem == "_plot" else set()
        assert {name.split(".")[0] for name in imports_of(path)} <= allowed | lazy, path


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
    assert any(file.endswith("licenses/LICENSE") for file in files)
