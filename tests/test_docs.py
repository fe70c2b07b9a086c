"""What the pages promise: their code runs, their commands and links exist, nothing is left out."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from text_runs import WORDS, tiny_chat
from tiny_models import ROOMY, TinyModel, build

import dynalora_adapters
import dynalora_optim

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
}
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")  # included by a page


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.M | re.S)


KNOWN = {"python", "console", "diff", "text", "{toctree}", "{eval-rst}", "{include}"}
SETTING = {"docs/processes.md": "one_process", "docs/trl.md": "chat"}
WITH_CODE = [page for page in PAGES if blocks(page, "python")]


def trainer_hands_over_the_model() -> bool:
    """Whether this version of transformers knows factories of optimizers; 5.0 does not."""
    from transformers import Trainer

    return "factory" in inspect.getsource(Trainer.create_optimizer)


@pytest.fixture
def one_process() -> Iterator[None]:
    """What torchrun would have made: a group, here of one process."""
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def chat(tmp_path: Path) -> dict[str, Any]:
    """What the reader of the page on TRL has: a chat model and conversations."""
    pytest.importorskip("trl")
    found = [
        [{"role": "user", "content": f"the film was {a}"}, {"role": "assistant", "content": b}]
        for a, b in pairwise(WORDS)
    ]
    return {"chat_checkpoint": str(tiny_chat(tmp_path / "chat")), "conversations": found}


def adapted(tiny: TinyModel) -> torch.nn.Module:
    config = dynalora_adapters.LoRAConfig(
        rank=2, alpha=4, targets=tiny.targets, trainable=tiny.trainable
    )
    return dynalora_adapters.inject(tiny.model, config)


def readers_own(folder: Path) -> dict[str, Any]:
    """What the pages say the reader has: a checkpoint, a model with adapters, and data."""
    tiny = build("bert", sizes=ROOMY)  # a budget has something to choose
    tiny.model.save_pretrained(folder / "checkpoint")
    rows = [{name: value[i] for name, value in tiny.batch.items()} for i in range(4)]
    (folder / "out").mkdir()
    return {
        "torch": torch,
        "checkpoint": str(folder / "checkpoint"),
        "model": adapted(tiny),
        "batch": tiny.batch,
        "loader": [tiny.batch] * 3,
        "dataset": rows * 2,
        "DynamicAllocationOptimizer": dynalora_optim.DynamicAllocationOptimizer,
    }


@pytest.mark.parametrize("page", WITH_CODE)
def test_every_python_block_runs(page, tmp_path, monkeypatch, request):
    for library in ("transformers", "peft", "accelerate", "matplotlib", "pytorch_optimizer"):
        pytest.importorskip(library)
    if page == "docs/trainers.md" and not trainer_hands_over_the_model():
        pytest.skip("this version of transformers does not hand the model to a factory")
    setting = request.getfixturevalue(SETTING[page]) if page in SETTING else None
    monkeypatch.chdir(tmp_path)
    namespace = {**readers_own(tmp_path), **(setting or {})}
    for number, source in enumerate(blocks(page, "python"), start=1):
        exec(compile(source, f"{page}, block {number}", "exec"), namespace)


def test_the_pages_with_code_are_these():
    assert len(WITH_CODE) >= 12
    assert sum(len(blocks(page, "python")) for page in WITH_CODE) >= 30
    for page, text in PAGES.items():
        fences = re.findall(r"^```(\S*)\n(.*?)^```", text, flags=re.M | re.S)
        languages = {language for language, _ in fences}
        assert languages <= KNOWN, page


def test_the_one_changed_line_is_the_one_that_runs():
    (diff,) = blocks("README.md", "diff")
    old, new = (line[1:] for line in diff.splitlines())
    names = {
        "torch": torch,
        "model": adapted(build("bert")),
        "DynamicAllocationOptimizer": dynalora_optim.DynamicAllocationOptimizer,
    }
    exec(old, names)
    assert type(names["optimizer"]) is torch.optim.AdamW
    exec(new, names)
    assert len(names["optimizer"].active_groups) == 3
    assert old.removeprefix("optimizer = ") in new


def test_ci_runs_the_readmes_own_commands():
    commands = [line for block in blocks("README.md", "console") for line in block.splitlines()]
    main = ["pip install tox && tox run -e quickstart", "pip install tox && tox run"]
    assert commands == [*main, "pip install ."]  # the last is what tox does with the wheel
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert set(main) <= set(ci)


def test_every_command_exists():
    tox = (ROOT / "tox.ini").read_text(encoding="utf-8")
    environments = {*re.findall(r"^\[testenv:([\w-]+)\]", tox, flags=re.M), "py"}
    found = 0
    for page, text in [*PAGES.items(), ("CONTRIBUTING.md", CONTRIBUTING)]:
        for name in re.findall(r"tox run -e ([\w-]+)", text):
            assert name in environments, f"{page}: tox run -e {name}"
            found += 1
        for script in re.findall(r"\b((?:examples|benchmarks)/[a-z_/]+\.(?:py|sh))\b", text):
            assert (ROOT / script).is_file(), f"{page}: {script}"
            found += 1
        for module in re.findall(r"python -m ((?:examples|benchmarks)[\w.]+)", text):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), page
            found += 1
    assert found > 5


def test_every_link_to_a_file_leads_to_one():
    for page, text in PAGES.items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if "://" not in target and not target.startswith("#"):
                file = (ROOT / page).parent / target.split("#")[0]
                assert file.exists(), f"{page}: {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9216


def test_every_row_of_the_support_table_names_a_test():
    rows = [line for line in PAGES["docs/support.md"].splitlines() if "`test_" in line]
    for row in rows:
        ((file, test),) = re.findall(r"`(test_\w+)::(test_\w+)` \|$", row)
        assert f"\ndef {test}(" in (ROOT / "tests" / f"{file}.py").read_text("utf-8"), row
    assert len(rows) > 30


def public_modules() -> Iterator[ModuleType]:
    """Every module that a user may import from: no part of its path begins with _."""
    for package in (dynalora_optim, dynalora_adapters):
        yield package
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not any(part.startswith("_") for part in found.name.split(".")):
                yield importlib.import_module(found.name)


def test_the_reference_has_every_public_module():
    pages = "\n".join(text for page, text in PAGES.items() if page.startswith("docs/reference/"))
    documented = set(re.findall(r"^\.\. automodule:: (\S+)$", pages, flags=re.M))
    exporting = {module.__name__ for module in public_modules() if getattr(module, "__all__", ())}
    assert documented == exporting


def test_every_public_name_is_documented():
    for module in public_modules():
        assert module.__doc__ or not getattr(module, "__all__", ()), module.__name__
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            assert inspect.getdoc(thing), f"{module.__name__}.{name}"
            for method, value in vars(thing).items() if inspect.isclass(thing) else ():
                if not method.startswith("_") and (callable(value) or isinstance(value, property)):
                    assert inspect.getdoc(value), f"{name}.{method}"
