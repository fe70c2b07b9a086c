"""Looking up which version of a package is installed, without importing the package."""

from __future__ import annotations

from importlib import metadata


def installed(package: str) -> str:
    """Return the version of ``package``, or ``"not installed"``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
