"""The Hugging Face hub, met at the edge: look once whether it answers, and say so plainly."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


def go_offline_unless_reachable(seconds: float = 5.0) -> bool:
    """Return whether the hub answers; where it does not, let its libraries use their caches only.

    Left to themselves they retry for most of a minute. They read the variable once, so call this
    before transformers or datasets are imported.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in {"", "0", "FALSE", "NO", "OFF"}:
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError as answer:  # an answer all the same
        answer.close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        return False
    return True


@contextmanager
def explained(what: str, alternative: str) -> Iterator[None]:
    """Turn a failure to load ``what`` from the hub into one sentence with a way out.

    Raises:
        OSError: In place of whichever error the hub's libraries raised.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise OSError(f"could not load {what}: {reason}. {alternative}") from error
