"""Standard streams that are closed, full, closed by their reader, or have another encoding."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from typing import TextIO

import pytest

from openagents_worker.cli import main
from openagents_worker.cli.commands import run, sessions
from openagents_worker.producer.client import Client
from tests.cli.conftest import Command

ARROW = "Grüße → 中"


def closed() -> None:
    """The value of a standard stream that was closed before Python started: None."""


def full() -> TextIO:
    """A stream to a full disk."""
    return open("/dev/full", "w", encoding="utf-8")  # noqa: PTH123 - closed by `Streams`


def left() -> TextIO:
    """A pipe whose reader has closed it, as `head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", encoding="utf-8")


def text(encoding: str = "utf-8") -> TextIO:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


class Streams:
    """Runs commands in this process with other standard streams."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._used: list[TextIO] = []

    def run(
        self, *arguments: str, stdin: TextIO | None = None, stdout: TextIO | None, stderr: TextIO | None
    ) -> int:
        """Run the command and return its exit code."""
        with self._monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["openagents-worker", *arguments])
            for name, stream in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
                patch.setattr(sys, name, stream)
            with pytest.raises(SystemExit) as ended:
                run()
            self._used += [sys.stdin, sys.stdout, sys.stderr]
        return int(ended.value.code or 0)

    def close(self) -> None:
        for stream in self._used:
            stream.close()


def written(stream: TextIO) -> str:
    raw = stream.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode(stream.encoding)


@pytest.fixture
def streams(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Generator[Streams]:
    monkeypatch.setenv("OPENAGENTS_REDIS_URL", redis_url)
    streams = Streams(monkeypatch)
    yield streams
    streams.close()


@pytest.fixture
def waiting(client: Client) -> Generator[None]:
    """A run r1 that waits in its queue."""
    client.submit({"agent_id": "a", "session_id": "s", "input_text": ARROW, "run_id": "r1"})
    yield
    client.cancel("r1")


FULL = "error: cannot write to standard output: No space left on device\n"


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize(
    ("arguments", "stdout", "code", "error"),
    [
        ("runs", closed, 0, ""),
        ("schema", full, 1, FULL),
        ("runs --json", full, 1, FULL),
        ("--help", full, 1, FULL),
        ("--help", left, 0, ""),
        ("runs --help", left, 0, ""),
        ("runs", left, 0, ""),
        ("show nobody --json", left, 2, ""),
    ],
)
def test_an_unusable_output_is_never_a_traceback(
    arguments: str, stdout: Callable[[], TextIO | None], code: int, error: str, streams: Streams
) -> None:
    """A closed stream discards the output, a full disk is one error line, and a closed pipe is a success."""
    stderr = text()

    assert streams.run(*arguments.split(), stdout=stdout(), stderr=stderr) == code
    assert written(stderr) == error


@pytest.mark.parametrize("stderr", [closed, full, left])
def test_an_unusable_standard_error_does_not_change_the_exit_code(
    stderr: Callable[[], TextIO | None], streams: Streams
) -> None:
    assert streams.run("show", "nobody", stdout=text(), stderr=stderr()) == 2
    assert streams.run("runz", stdout=text(), stderr=stderr()) == 1


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("arguments", ["show r1", "show r1 --json"])
def test_a_character_that_cannot_be_encoded_is_escaped(arguments: str, streams: Streams) -> None:
    """The answer is shown and not replaced by a traceback. JSON keeps its value."""
    stdout = text("latin-1")

    assert streams.run(*arguments.split(), stdout=stdout, stderr=text()) == 0
    assert "Grüße \\u2192 \\u4e2d" in written(stdout)


def test_a_closed_standard_input_is_an_empty_text(streams: Streams, client: Client) -> None:
    """`-` reads standard input."""
    stdout = text()
    code = streams.run(
        "run", "a", "-", "--detach", "--run-id", "r1", stdin=None, stdout=stdout, stderr=text()
    )
    client.cancel("r1")

    assert (code, written(stdout)) == (0, "r1\n")


def test_a_closed_output_stops_the_watching_of_a_waiting_run(redis_url: str, client: Client) -> None:
    """The notice about the waiting run cannot be written, so the command ends. The run continues."""
    command = [sys.executable, "-m", "openagents_worker.cli", "run", "a", "hi", "--run-id", "r1"]
    env = {**os.environ, "OPENAGENTS_REDIS_URL": redis_url}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        code = process.wait(120)
    client.cancel("r1")

    assert code == 0


def test_without_a_command_the_help_is_shown(command: Command) -> None:
    """Only the help, without an error message."""
    done = command()

    assert done.code == 1
    assert done.err.startswith("Usage: openagents-worker [OPTIONS] COMMAND")
    assert done.err.count("Usage:") == 1
    assert "Error" not in done.err


@pytest.mark.parametrize(
    ("arguments", "says", "hint"),
    [
        (("runz", "--json"), "No such command 'runz'", "openagents-worker --help"),
        (("runs", "--state", "fialed", "--json"), "'fialed' is not one of", "openagents-worker runs --help"),
        (("show", "--json"), "Missing argument 'RUN'", "openagents-worker show --help"),
        (("resume", "--json"), "give either the ids of runs or options", "openagents-worker resume --help"),
    ],
)
def test_a_wrong_command_line_is_json_too(
    command: Command, arguments: tuple[str, ...], says: str, hint: str
) -> None:
    """A program that reads the output sees why nothing was done."""
    done = command(*arguments)

    assert (done.code, done.err) == (1, "")
    assert says in done.json["error"]["message"]
    assert (done.json["error"]["code"], done.json["error"]["hint"]) == ("usage", hint)


def test_a_bug_is_not_a_wrong_command_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback, and the exit code of an error of another kind."""
    monkeypatch.setattr(sessions.Client, "prune", lambda _: 1 // 0)

    done = command("prune")

    assert (done.code, done.out) == (3, "")
    assert done.err.rstrip().endswith("ZeroDivisionError: integer division or modulo by zero")


def test_ctrl_c_during_the_start_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code is 130. The start takes most of the time of a command."""

    class Interrupted:
        def find_spec(self, name: str, *_args: object) -> None:
            if name == "openagents_worker.cli.commands":
                signal.raise_signal(signal.SIGINT)

    for name in [name for name in sys.modules if name.startswith("openagents_worker.cli.commands")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 130
