"""`dev` where something is in its way: files that cannot be watched, or a Redis of the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from openagents_worker.cli.commands import processes
from openagents_worker.errors import ConfigError
from openagents_worker.local.changes import changed_files
from openagents_worker.local.stack import Stack
from tests.cli.conftest import Command
from tests.support.development import COMMAND, PATIENCE_S


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


def test_the_data_of_a_redis_that_is_not_started_is_kept_nowhere(command: Command, tmp_path: Path) -> None:
    """The option would be ignored."""
    done = command("dev", "--data-dir", str(tmp_path / "data"))

    assert done.code == 1
    assert "OPENAGENTS_REDIS_URL is set, so dev starts no Redis" in done.err
    assert not (tmp_path / "data").exists()


def test_a_port_of_a_redis_that_is_not_started_is_refused(command: Command) -> None:
    done = command("dev", "--redis-port", "7000")

    assert (done.code, "unset it, or leave --redis-port out" in done.err) == (1, True)


@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", "OPENAI_BASE_URL"])
def test_a_script_beside_a_real_model_is_refused(
    command: Command, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """The real model would answer, and cost money."""
    monkeypatch.setenv(variable, "http://127.0.0.1:1")

    done = command("dev", "--model", "replies.json")

    assert done.code == 1
    assert f"{variable} is set, so dev starts no scripted model" in done.err


def test_the_variable_for_concurrency_counts_if_the_option_is_not_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAGENTS_CONCURRENCY", "7")

    found = [processes.dev.make_context("dev", [*given]) for given in ((), ("--concurrency", "9"))]

    assert [context.params["concurrency"] for context in found] == [7, 9]


def test_dev_says_why_it_starts_no_redis(tmp_path: Path) -> None:
    """The variable may be left from an earlier `dev`, which has printed it."""
    env = {**os.environ, "OPENAGENTS_REDIS_URL": "redis://127.0.0.1:1/0", "OPENAI_API_KEY": "sk-1"}
    command = [*COMMAND, "dev", "--flower-port=0"]

    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)

    assert done.returncode == 4
    assert "unset OPENAGENTS_REDIS_URL, and dev starts one" in done.stderr
