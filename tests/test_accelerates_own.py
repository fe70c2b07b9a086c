"""Accelerate's own tests, with every torch optimizer in them wrapped by ours, all modules active.

``tox run -e accelerate-own`` runs them. The scripts are part of the installed package. The tests
are in its source distribution only. That is downloaded; without a network they are skipped.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest
from processes import accelerate_launch, environment

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("parameterized", reason="accelerate's tests need it")
pytestmark = pytest.mark.slow

FILES = ("test_optimizer", "test_scheduler", "test_state_checkpointing", "test_accelerator")
SCRIPTS = ("test_sync", "test_script")


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of accelerate's tests, of the installed version."""
    folder = tmp_path_factory.mktemp("accelerate")
    wanted = f"accelerate=={version('accelerate')}"
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder)]
    pip = [sys.executable, "-m", "pip", "download", "-q", *options, wanted]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot download the source of {wanted}: {done.stderr.strip()[-200:]}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    (found,) = folder.glob("*/tests")
    return found


@pytest.fixture
def wrapping(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which torch's optimizers are ours around torch's."""
    here = Path(__file__).parent
    tmp_path.joinpath("sitecustomize.py").write_text(
        "import accelerate_all_active\naccelerate_all_active.install()\n"
    )
    path = [str(tmp_path), str(here), *(p for p in sys.path if p)]
    log = str(tmp_path / "wrapped")
    return {**environment(), "PYTHONPATH": os.pathsep.join(path), "DYNALORA_WRAPPED": log}


def wrapped(environment: dict[str, str]) -> int:
    """How many optimizers were wrapped."""
    return Path(environment["DYNALORA_WRAPPED"]).read_text().count("\n")


def outcomes(file: Path, environment: dict[str, str]) -> dict[str, str]:
    """What became of each test of ``file``."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:randomly", file.name]
    done = subprocess.run(
        command, cwd=file.parent, env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout[-6000:], done.stderr[-2000:])
    found = re.findall(r"^(PASSED|FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return {name: outcome for outcome, name in found}


@pytest.mark.parametrize("name", FILES)
def test_its_tests_pass(name, tests, wrapping):
    found = outcomes(tests / f"{name}.py", wrapping)
    failed = {test for test, outcome in found.items() if outcome != "PASSED"}
    assert len(found) > len(failed)
    if failed:  # what fails without us too has other reasons, such as a model hub
        plain = outcomes(tests / f"{name}.py", environment())
        failed -= {test for test, outcome in plain.items() if outcome != "PASSED"}
    assert not failed
    assert wrapped(wrapping)


@pytest.mark.parametrize("name", SCRIPTS)
def test_its_scripts_pass_on_two_processes(name, wrapping):
    script = Path(accelerate.__file__).parent / "test_utils" / "scripts" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, *accelerate_launch(2), str(script)],
        env=wrapping,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-4000:], done.stderr[-4000:])
    assert done.returncode == 0
    assert wrapped(wrapping) >= 2
