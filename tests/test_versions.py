"""Supported versions: what is promised is what is tested, and what is done without a private name.

No file reads a private name of torch but the one of each package that says what happens without it.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toy import ToyModel, batch, wrapped

import dynalora_adapters
import dynalora_optim
from dynalora_adapters import LoRAConfig, _torch_private, inject
from dynalora_optim import Periodic, estimate_memory
from dynalora_optim._base import torch_private

ROOT = Path(__file__).parent.parent
PRIVATE = {
    dynalora_optim: (
        "torch_private.py",
        "torch_private_autograd.py",
        "torch_private_fsdp.py",
        "torch_private_hooks.py",
    ),
    dynalora_adapters: ("_torch_private.py", "_torch_private_recipes.py"),
}
# Private names of transformers, and a mark that our adapters leave on a model.
NOT_OF_TORCH = {
    "_gradient_checkpointing_func",
    "_dynalora_injection",
    "_hf_hook",  # accelerate's
    "_tied_weights_keys",  # transformers'
    "_fields",  # of a named tuple
}


def trees(package) -> dict[Path, ast.Module]:
    root = Path(package.__file__).parent
    return {path: ast.parse(path.read_text("utf-8")) for path in sorted(root.rglob("*.py"))}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree: ast.Module) -> Iterator[str]:
    """The names that a file gives to something of its own."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) == "self"
        ):
            yield node.attr


def mentioned(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The private names that a file imports from torch, reads as an attribute, or spells out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, part) for part in parts if is_private(part))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and re.fullmatch(r"_[a-z]\w*", str(node.value)):
            yield node.lineno, node.value


@pytest.mark.parametrize("package", PRIVATE, ids=lambda package: package.__name__)
def test_one_file_alone_touches_private_names_of_torch(package):
    files = trees(package)
    own = {name for tree in files.values() for name in defined(tree)} | NOT_OF_TORCH
    found = [
        f"{path.name}:{line} {name}"
        for path, tree in files.items()
        if path.name not in PRIVATE[package]
        for line, name in mentioned(tree)
        if name not in own
    ]
    assert not found
    private = [tree for path, tree in files.items() if path.name in PRIVATE[package]]
    assert {name for tree in private for _, name in mentioned(tree)} > {
        "_C",
        "_modules",
        "_forward_hooks",
    }


def test_what_looks_for_private_names_finds_each_kind():
    source = """
from torch.utils._pytree import tree_map
from torch.nn.modules.module import _global_hooks
torch._C.x
module._parameters
getattr(model, "_orig_mod")
self.__dict__
for _ in (): pass
"""
    found = {name for _, name in mentioned(ast.parse(source))}
    assert found == {"_pytree", "_global_hooks", "_C", "_parameters", "_orig_mod"}


# Without a private name


def test_lists_of_tensors_are_computed_alike_without_foreach(monkeypatch):
    left = [torch.randn(3), torch.randn(2, 2)]
    right = [torch.randn(3), torch.randn(2, 2)]

    def results():
        return [
            *torch_private.add_all(left, right, alpha=0.3),
            *torch_private.distances(left, right),
            *torch_private.scale_all(left, 0.7),
        ]

    expected = results()
    for name in ("add", "sub", "abs", "mul"):
        monkeypatch.delattr(torch, f"_foreach_{name}")
    torch.testing.assert_close(results(), expected, rtol=0, atol=0)


def test_batch_norms_are_found_without_their_private_base(monkeypatch):
    modules = [nn.BatchNorm1d(2), nn.SyncBatchNorm(2), nn.InstanceNorm1d(2), nn.LayerNorm(2)]
    modules[2].track_running_stats = False
    before = [torch_private.is_batch_norm(module) for module in modules]
    assert before == [True, True, True, False]
    monkeypatch.delattr(nn.modules.batchnorm, "_NormBase")
    assert [torch_private.is_batch_norm(m) for m in modules] == [True, True, False, False]


def test_a_pass_cannot_be_scored_where_torch_does_not_say_whether_it_is_a_backward(monkeypatch):
    model = ToyModel()
    optimizer = wrapped(model)
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    found = re.escape(torch.__version__)
    with pytest.raises(RuntimeError, match=rf"_current_graph_task_id.*torch {found}.*versions\.md"):
        model(batch())
    optimizer.close()
    model(batch())


def test_ddp_is_refused_where_torch_does_not_say_whether_it_runs(monkeypatch):
    assert torch_private.active_ddp() is None
    monkeypatch.delattr(DistributedDataParallel, "_get_active_ddp_module")
    with pytest.raises(RuntimeError, match=r"DistributedDataParallel needs .*_get_active_ddp"):
        torch_private.active_ddp()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch._C, "_are_functorch_transforms_active"),
        (nn.modules.module, "_has_any_global_hook"),
        (torch.autograd.forward_ad, "_current_level"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_adapters_compute_the_same_without_a_private_name(owner, name, monkeypatch):
    model = inject(nn.Sequential(nn.Linear(4, 3)), LoRAConfig(rank=2, alpha=4, targets=["0"]))
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(5, 4, requires_grad=True)

    def results():
        out = model(x)
        return out, *torch.autograd.grad(out.square().sum(), [x, model[0].lora_A, model[0].lora_B])

    expected = results()
    assert type(expected[0].grad_fn).__name__.startswith("LoRAFunction")
    monkeypatch.delattr(owner, name)
    found = results()
    assert not type(found[0].grad_fn).__name__.startswith("LoRAFunction")
    torch.testing.assert_close(found, expected)


def test_a_lazy_layer_is_none_to_adapt_without_the_undocumented_question(monkeypatch):
    lazy = nn.LazyLinear(3)
    assert _torch_private.is_lazy(lazy.weight)
    assert not _torch_private.is_lazy(torch.zeros(2))
    monkeypatch.delattr(nn.parameter, "is_lazy")
    assert _torch_private.is_lazy(lazy.weight)
    assert not _torch_private.is_lazy(torch.zeros(2))


class AsksForAutocast(ToyModel):
    """As models of transformers before 5.4 do."""

    def forward(self, x):
        torch.is_autocast_enabled(x.device.type)
        return super().forward(x)


def test_a_model_that_only_a_newer_transformers_can_rehearse_names_that_version():
    def make(model):
        return torch.optim.SGD(model.parameters())

    with pytest.raises(
        ValueError, match=r"before 5\.4 calls it; found (\d|not installed).*measure_step"
    ):
        estimate_memory(AsksForAutocast(), (batch(),), make)


# What is promised


def pins(path: Path) -> dict[str, str]:
    """The versions in a file of ``name==version`` lines."""
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text("utf-8"), flags=re.M))


def bounds() -> dict[str, str]:
    """The lower bounds in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)"', text))


def padded(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in version.split(".")]
    return tuple(numbers + [0] * (3 - len(numbers)))


def test_the_lower_bounds_are_the_versions_of_the_lowest_set():
    lowest = pins(ROOT / "tests" / "lowest.txt")
    promised = {name: bound for name, bound in bounds().items() if name in lowest}
    assert {"torch", "safetensors", "transformers", "peft", "accelerate"} <= promised.keys()
    for name, bound in promised.items():
        promise = bound.split(".")
        assert lowest[name].split(".")[: len(promise)] == promise, name


def test_the_sets_are_between_the_lowest_and_the_newest():
    low, image, new = (
        pins(ROOT / name) for name in ("tests/lowest.txt", "tests/gpu-image.txt", "constraints.txt")
    )
    for name in ("torch", "transformers", "peft", "accelerate"):
        assert padded(low[name]) <= padded(image[name]) <= padded(new[name])
    assert padded(low["torch"]) < padded(image["torch"]) < padded(new["torch"])


def test_the_page_shows_the_versions_of_each_set():
    page = (ROOT / "docs" / "versions.md").read_text("utf-8")
    rows = {row[0].strip(" `"): row[1:] for row in map(cells, page.splitlines()) if row}
    sets = [pins(ROOT / f) for f in ("tests/lowest.txt", "tests/gpu-image.txt", "constraints.txt")]
    for name in ("torch", "transformers", "peft", "accelerate", "safetensors", "datasets"):
        assert [cell.strip() for cell in rows[name]] == [pinned[name] for pinned in sets], name


def cells(line: str) -> list[str]:
    return line.strip().strip("|").split("|") if line.startswith("|") else []


def test_tox_and_ci_run_each_set():
    tox = (ROOT / "tox.ini").read_text("utf-8")
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    for name in ("lowest", "gpu-image"):
        assert f"[testenv:{name}]" in tox
        assert f"-r tests/{name}.txt" in tox
        assert name in re.search(r"^sets=\((.*)\)$", ci, flags=re.M)[1].split()


# What a user reports


def report() -> str:
    out = io.StringIO()
    dynalora_optim.show_versions(out)
    return out.getvalue()


def test_versions_are_shown_as_they_are_installed(capsys):
    lines = report().splitlines()
    rows = dict(line.split(None, 1) for line in lines)
    assert rows["torch"] == metadata.version("torch")
    assert rows["safetensors"] == metadata.version("safetensors")
    assert rows["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert rows["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    dynalora_optim.show_versions()
    assert capsys.readouterr().out.splitlines() == lines


def test_versions_show_what_each_optimizer_drives_while_it_does():
    optimizer = wrapped(ToyModel(), active=2, period=7, seed=3, allocator="topk")
    (line,) = [line for line in report().splitlines() if "ToyModel" in line or "seed=3" in line]
    for part in (repr(optimizer), "active=2", "TopK()", repr(Periodic(7)), "seed=3"):
        assert part in line
    optimizer.close()
    assert "seed=3" not in report()


def test_a_package_that_is_missing_is_shown_as_such(monkeypatch):
    def version(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    assert re.search(r"^peft +not installed$", report(), flags=re.M)


def test_versions_are_looked_up_without_an_import_of_optional_packages():
    code = (
        "import sys, dynalora_optim; dynalora_optim.show_versions(); "
        "print({'transformers', 'peft', 'accelerate'} & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines()[-1] == "set()"


# The project's habits


def parsed(path: str) -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / path).read_text("utf-8"))


def steps(workflow: dict) -> list[str]:
    return [s["run"] for job in workflow["jobs"].values() for s in job["steps"] if "run" in s]


def test_the_workflow_runs_what_a_developer_runs():
    assert steps(parsed(".github/workflows/ci.yml")) == ["bash .ci/run"]
    assert (ROOT / ".ci" / "run").is_file()


def test_a_release_is_built_and_checked_before_a_tag_publishes_it():
    workflow = parsed(".github/workflows/release.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads "on" as a truth value
    commands = steps({"jobs": {"build": workflow["jobs"]["build"]}})
    assert commands.index("python -m build") < commands.index("twine check --strict dist/*")
    assert workflow["jobs"]["publish"]["needs"] == "build"


def test_the_hooks_before_a_commit_are_tools_of_the_environment():
    (repository,) = parsed(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff", "ruff-format", "mypy"]
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].split()[0] in bounds()  # of the extra named dev


def test_the_citation_is_of_this_version():
    citation = parsed("CITATION.cff")
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'version = "{citation["version"]}"' in project
    assert f'license = "{citation["license"]}"' in project
    assert citation["cff-version"] == "1.2.0"
    paper = citation["preferred-citation"]
    assert paper["title"] == "Dynamic Low-Rank Module Allocation"
    assert all(author.keys() == {"given-names", "family-names"} for author in paper["authors"])


def test_the_issue_form_asks_for_what_prints_the_versions(capsys):
    form = parsed(".github/ISSUE_TEMPLATE/bug.yml")
    (field,) = [field for field in form["body"] if field["id"] == "versions"]
    assert field["validations"] == {"required": True}
    ((code,),) = [re.findall(r'python -c "(.*)"', field["attributes"]["description"])]
    exec(code, {})
    assert metadata.version("torch") in capsys.readouterr().out
