"""Which versions of packages are installed, looked up without an import."""

from __future__ import annotations

from importlib import metadata


def installed(package: str) -> str:
    """Return the version of ``package``, or ``"not installed"``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
