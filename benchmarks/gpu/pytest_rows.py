"""A pytest plugin. It writes a row for each test when the test has finished."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gpu._lines import Lines, given_facts

FOLDER = "DYNALORA_GPU_FOLDER"
_STATUS = {"passed": "ok", "failed": "failed", "skipped": "skipped"}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a row for a test that has run, was skipped, or could not run."""
    if report.when != "call" and report.outcome == "passed":
        return  # there is another report, for the call
    lines = Lines(Path(os.environ[FOLDER]), "tests", given_facts())
    status = _STATUS[report.outcome]
    lines.add(report.nodeid, status, reason=_reason(report), seconds=report.duration)


def _reason(report: pytest.TestReport) -> str:
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr)[:500]
