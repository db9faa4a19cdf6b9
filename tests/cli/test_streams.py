"""Standard streams that are closed, full or of another encoding. Each command is a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from openagents_worker.cli import main
from openagents_worker.producer.client import Client
from tests.cli.conftest import Command

OPENAGENTS = f"{sys.executable} -m openagents_worker.cli"
ARROW = "Grüße → 中"


def in_shell(line: str, url: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    """What a shell makes of the line; its exit code is that of the first command of a pipe."""
    return subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        env={**os.environ, "OPENAGENTS_REDIS_URL": url, **env},
        capture_output=True,
        timeout=120,
        check=False,
    )


def test_whatever_the_streams_are_there_is_no_traceback(redis_url: str, client: Client) -> None:
    """A closed stream is an empty one; a full disk is one line; a reader that leaves is no failure."""
    client.submit({"agent_id": "a", "session_id": "s", "input_text": ARROW, "run_id": "r1"})
    full = b"error: cannot write to standard output: No space left on device\n"
    expected = {
        f"{OPENAGENTS} runs >&-": (0, b""),
        f"{OPENAGENTS} runs 2>&- >/dev/null": (0, b""),
        f"{OPENAGENTS} schema >/dev/full": (1, full),
        f"{OPENAGENTS} runs --json >/dev/full": (1, full),
        f"{OPENAGENTS} --help >/dev/full": (1, full),
        f"{OPENAGENTS} --help | true": (0, b""),
        f"{OPENAGENTS} runs --help | true": (0, b""),
        f"{OPENAGENTS} show nobody --json | true": (2, b""),
        f"{OPENAGENTS} show nobody 2>&1 | true": (2, b""),
        f"{OPENAGENTS} runz 2>&1 | true": (1, b""),
        f"{OPENAGENTS} show nobody 2>/dev/full": (2, b""),
    }

    with ThreadPoolExecutor(3) as threads:
        done = dict(zip(expected, threads.map(lambda line: in_shell(line, redis_url), expected), strict=True))
    client.cancel("r1")

    assert {line: (d.returncode, d.stderr) for line, d in done.items()} == expected


def test_an_encoding_that_lacks_a_character_shows_its_escape(redis_url: str, client: Client) -> None:
    """An answer that was paid for is shown, not lost in a traceback; JSON stays the same value."""
    client.submit({"agent_id": "a", "session_id": "s", "input_text": ARROW, "run_id": "r1"})
    for_people = in_shell(f"{OPENAGENTS} show r1", redis_url, PYTHONIOENCODING="latin-1")
    for_programs = in_shell(f"{OPENAGENTS} show r1 --json", redis_url, PYTHONIOENCODING="latin-1")
    client.cancel("r1")

    assert "Grüße \\u2192 \\u4e2d" in for_people.stdout.decode("latin-1"), for_people.stderr
    assert '"Grüße \\u2192 \\u4e2d"' in for_programs.stdout.decode("latin-1"), for_programs.stderr


def test_no_input_is_no_traceback(redis_url: str, client: Client) -> None:
    """`-` reads standard input; where that is closed there is none."""
    done = in_shell(f"{OPENAGENTS} run a - --detach --run-id r1 <&-", redis_url)
    client.cancel("r1")

    assert (done.returncode, done.stdout, done.stderr) == (0, b"r1\n", b"")


def test_a_reader_that_left_ends_the_watching_of_a_run_that_waits(redis_url: str, client: Client) -> None:
    """The line that says why it waits finds nobody; the run goes on."""
    done = in_shell(f"{OPENAGENTS} run a hi --run-id r1 2>&1 | head -1 >/dev/null", redis_url)
    client.cancel("r1")

    assert (done.returncode, done.stderr) == (0, b"")


def test_without_a_command_there_is_help(command: Command) -> None:
    """The list of commands, and not an error that quotes it."""
    done = command()

    assert done.code == 1
    assert done.err.startswith("Usage: openagents-worker [OPTIONS] COMMAND")
    assert done.err.count("Usage:") == 1
    assert "Error" not in done.err


def test_ctrl_c_while_it_starts_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the command takes most of its time: 130 then, too, and nothing is said."""

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
