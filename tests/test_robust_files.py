"""Adapter files that are hostile, and disks and processes that get in the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import build, randomize_trainable, same, snapshot
from torch import nn

from dynalora_adapters import LoRAConfig, inject, load_adapter, save_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
on_posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")


def adapted(rank: int = 4, seed: int = 1) -> nn.Module:
    tiny = build("stack")
    options = {"targets": tiny.targets, "trainable": tiny.trainable}
    inject(tiny.model, LoRAConfig(rank=rank, alpha=2 * rank, **options))
    randomize_trainable(tiny.model, seed)
    return tiny.model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    save_adapter(adapted(), folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of the good files, to be spoilt."""
    for name, raw in contents(good).items():
        (tmp_path / name).write_bytes(raw)
    return tmp_path


def in_threads(*tasks: Callable[[], object]) -> list[BaseException]:
    """Run ``tasks`` at the same time; return what they raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(tasks))

    def run(task: Callable[[], object]) -> None:
        barrier.wait()
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


# Hostile files


def loads_or_is_refused(folder: Path) -> bool:
    """Load into a bare model; where that is refused the error names the file that is to blame."""
    model = build("stack").model
    before = snapshot(model)
    try:
        load_adapter(model, folder)
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error)  # noqa: PT017
        assert same(before, snapshot(model))
        return False
    return True


def with_header(header: str | bytes, length: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file with this header, which may lie about its length."""
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


fuzzed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzzed
@given(raw=st.binary(max_size=200))
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_random_bytes_are_refused(folder: Path, good: Path, name: str, raw: bytes) -> None:
    (folder / name).write_bytes(raw)
    assert not loads_or_is_refused(folder)


@fuzzed
@given(data=st.data())
def test_a_mutated_configuration_loads_or_is_refused(
    folder: Path, good: Path, data: st.DataObject
) -> None:
    raw = bytearray((good / CONFIG).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw)))
        end = data.draw(st.integers(start, min(start + 8, len(raw))))
        raw[start:end] = data.draw(st.binary(max_size=4))
    (folder / CONFIG).write_bytes(raw)
    loads_or_is_refused(folder)


names = st.text(max_size=6) | st.sampled_from(
    ["__metadata__", "base_model.model.", "base_model.model.head.bias", "\u202e", "a" * 10**5]
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "F4", "C64", "F8_E8M0", "", "f32"]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 2**31, 2**63, 2**64, -1, 1.5]), max_size=9),
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 2**63, -1]), max_size=3),
    }
)


@fuzzed
@given(
    header=st.dictionaries(names, entries | st.none() | st.dictionaries(names, names), max_size=4),
    length=st.none() | st.sampled_from([0, 1, 10**8, 10**8 + 1, 2**31, 2**32, 2**63, 2**64 - 1]),
)
def test_any_header_is_refused_that_does_not_fit(
    folder: Path, header: dict[str, Any], length: int | None
) -> None:
    (folder / WEIGHTS).write_bytes(with_header(json.dumps(header), length, bytes(16)))
    assert not loads_or_is_refused(folder)


ENTRY = '{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
HOSTILE: dict[str, bytes] = {
    "deep list": with_header("[" * 10**5),
    "deep object": with_header('{"a":' * 10**5),
    "names twice": with_header(f'{{"a": {ENTRY}, "a": {ENTRY}}}'),
    "half a surrogate": with_header(f'{{"\\ud800": {ENTRY}}}'),
    "a zero in a name": with_header(f'{{"\\u0000": {ENTRY}}}'),
    "not UTF-8": with_header(b'{"\xff": ' + ENTRY.encode() + b"}"),
    "metadata of another kind": with_header('{"__metadata__": {"format": 1}}'),
    "only zeros": bytes(4096),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(case: str, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(HOSTILE[case])
    assert not loads_or_is_refused(folder)


def test_weights_cut_off_anywhere_are_refused(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    for end in range(0, len(raw), 37):
        (folder / WEIGHTS).write_bytes(raw[:end])
        assert not loads_or_is_refused(folder)


@pytest.mark.parametrize("option", ["r", "target_modules", "unknown"])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_any_depth_of_nesting_is_refused_rather_than_overflows(
    folder: Path, option: str, opening: str, closing: str
) -> None:
    # Just below the depth at which JSON itself gives up, what reads on must not give up either.
    known = json.loads((folder / CONFIG).read_bytes())
    known.pop(option, None)

    def load() -> None:
        limit = sys.getrecursionlimit()
        for depth in [limit // 2, *range(limit - 30, limit), 10 * limit]:
            deep = opening * depth + ("1" if opening.endswith(":") else "") + closing * depth
            (folder / CONFIG).write_text(json.dumps(known)[:-1] + f', "{option}": {deep}}}')
            assert not loads_or_is_refused(folder)

    assert in_threads(load) == []  # where the stack is nearly empty


@pytest.mark.parametrize("depth", [50, 300, *range(440, 500), 10**4])
def test_expressions_of_any_depth_load_or_are_refused(folder: Path, depth: int) -> None:
    raw = json.loads((folder / CONFIG).read_bytes())
    for option in ({"rank_pattern": {"(" * depth + "x" + ")" * depth: 2}}, {"target_modules": "("}):
        (folder / CONFIG).write_text(json.dumps({**raw, **option}))
        loads_or_is_refused(folder)


def test_of_an_option_given_twice_the_last_counts_as_for_peft(folder: Path) -> None:
    text = (folder / CONFIG).read_text().rstrip()[:-1]
    (folder / CONFIG).write_text(text + ', "r": 3}')
    assert not loads_or_is_refused(folder)
    (folder / CONFIG).write_text(text + ', "r": 3, "r": 4}')
    assert loads_or_is_refused(folder)


class Planted:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "adapter_model.bin"])
def test_nothing_in_a_file_is_executed(name: str, folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    if name == "adapter_model.bin":
        (folder / WEIGHTS).unlink()
    torch.save({"base_model.model.head.bias": Planted(mark)}, folder / name)
    assert not loads_or_is_refused(folder)
    assert not mark.exists()
    torch.load((folder / name).rename(tmp_path / "a.pt"), weights_only=False)
    assert mark.exists()  # a pickle it is


# Disks


SAVE_WITH_LIMIT = """
import resource, sys
from test_robust_files import adapted, save_adapter
model = adapted(rank=2)
for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_adapter(model, sys.argv[1])
    except OSError as error:
        print(limit, error)
    else:
        print(limit, "saved")
"""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Run ``code`` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@on_posix
def test_a_disk_that_fills_up_at_any_byte_leaves_the_old_files_whole(folder: Path) -> None:
    old = contents(folder)
    limits = [0, 1, 8, 100, 500, 1000, 2000, 3000, 4000]
    process = python(SAVE_WITH_LIMIT, folder, *limits)
    output, _ = process.communicate(timeout=100)
    lines = output.splitlines()
    failed = [line for line in lines if "File too large" in line and str(folder) in line]
    assert process.returncode == 0, output
    assert len(lines) == len(failed) == len(limits), output
    assert contents(folder) == old


def test_a_network_disk_that_is_full_only_when_asked_leaves_the_old_files_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = contents(folder)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted(rank=2), folder)
    assert contents(folder) == old


def test_a_folder_that_cannot_be_made_is_an_os_error(folder: Path) -> None:
    with pytest.raises(OSError, match=CONFIG):
        save_adapter(adapted(), folder / CONFIG)
    with pytest.raises(OSError, match=CONFIG):
        save_adapter(adapted(), folder / CONFIG / "below")


@on_posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_that_may_not_be_written_is_left_alone(folder: Path) -> None:
    old = contents(folder)
    folder.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=str(folder)):
            save_adapter(adapted(rank=2), folder)
        assert contents(folder) == old
        load_adapter(build("stack").model, folder)
    finally:
        folder.chmod(0o700)


# Several at once


SAVE_OFTEN = """
import sys
from test_robust_files import adapted, save_adapter
model = adapted(rank=int(sys.argv[2]))
for _ in range(300):
    save_adapter(model, sys.argv[1])
"""


def rank_of(folder: Path) -> int:
    """The rank that both files agree on."""
    (rank,) = {t.shape[0] for k, t in load_file(folder / WEIGHTS).items() if "lora_A" in k}
    assert json.loads((folder / CONFIG).read_text())["r"] == rank
    return int(rank)


@on_posix
def test_savers_at_the_same_time_leave_a_pair_of_one_and_readers_see_nothing_else(
    folder: Path,
) -> None:
    models = [adapted(rank) for rank in (2, 4)]
    done = threading.Event()

    def save(model: nn.Module) -> None:
        for _ in range(60):
            save_adapter(model, folder)

    def read() -> None:
        while not done.is_set():
            load_adapter(build("stack").model, folder)

    def write() -> None:
        try:
            assert in_threads(*[lambda model=model: save(model) for model in models]) == []
        finally:
            done.set()

    assert in_threads(write, read) == []
    assert rank_of(folder) in (2, 4)
    assert contents(folder).keys() == {WEIGHTS, CONFIG}


@on_posix
@pytest.mark.slow
def test_processes_that_save_at_the_same_time_leave_a_pair_of_one(folder: Path) -> None:
    processes = [python(SAVE_OFTEN, folder, rank) for rank in (2, 4)]
    while any(process.poll() is None for process in processes):
        load_adapter(build("stack").model, folder)
    assert [process.communicate()[0] for process in processes] == ["", ""]
    assert [process.returncode for process in processes] == [0, 0]
    assert rank_of(folder) in (2, 4)
    assert contents(folder).keys() == {WEIGHTS, CONFIG}
