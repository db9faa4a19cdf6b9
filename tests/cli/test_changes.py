"""Changes of files in `dev`: what is seen, and what happens if the system does not watch them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from openagents_worker.cli.commands import processes
from openagents_worker.errors import ConfigError
from openagents_worker.local.changes import changed_files
from openagents_worker.local.stack import Stack


def test_files_that_cannot_be_watched_are_an_error_that_names_them(tmp_path: Path) -> None:
    """For example below a folder that may not be read."""
    with pytest.raises(ConfigError, match=r"/missing cannot be watched") as error:
        next(changed_files(tmp_path / "missing"))
    assert "must be readable" in str(error.value.hint)


def test_dev_goes_on_without_watching(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so, and its processes run until one of them ends."""
    monkeypatch.setattr(processes.Path, "cwd", lambda: tmp_path / "missing")
    with Stack(redis_url=redis_url) as stack:
        ended = stack._start("short", [sys.executable, "-c", ""])

        assert processes._replace_on_changes(stack, ended, 1) is ended

    assert "cannot be watched" in (shown := capsys.readouterr().err)
    assert "changes of files start no new worker" in shown
