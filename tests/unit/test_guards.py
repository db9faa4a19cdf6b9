"""The guards of `tests/support/guards.py`: a test that breaks a rule fails with the reason."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BAD_TESTS = """
import asyncio, contextlib, socket, threading, time
import pytest
from tests.support.guards import MAX_CPU_S, OTHER_SIDE

def test_reaches_out():
    with contextlib.suppress(OSError), socket.socket() as s:
        s.connect(("192.0.2.1", 80))

async def test_blocks_the_loop():
    time.sleep(0.3)

@pytest.mark.allow_blocking(reason="it measures blocking")
async def test_may_block():
    time.sleep(0.3)

async def test_keeps_the_loop_busy():
    began_s = time.thread_time()
    while time.thread_time() - began_s < MAX_CPU_S + 0.1:
        pass

def test_a_model_server_takes_its_time():
    thread = threading.Thread(target=lambda: asyncio.run(test_keeps_the_loop_busy()), name=OTHER_SIDE)
    thread.start()
    thread.join()

async def test_waits_on_the_loop():
    threading.Event().wait(0.01)

async def test_may_run_others():
    await asyncio.to_thread(time.sleep, 0.01)
    await asyncio.sleep(0.01)

def test_leaves_a_socket_open():
    left = [socket.socket()]
    left.append(left)

async def test_loses_an_error():
    async def fails():
        raise ValueError("unheard")
    task = asyncio.ensure_future(fails())
    await asyncio.wait([task])

def test_fine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("guarded") / "test_bad.py"
    file.write_text(BAD_TESTS)
    options = [
        "-p",
        "tests.support.guards",
        "-p",
        "no:cacheprovider",
        "-rA",
        "-q",
        "-o",
        "addopts=",
        "-c",
        "pyproject.toml",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return run.stdout


def test_a_connection_beyond_this_machine_fails_the_test_even_when_the_error_is_swallowed(
    outcome: str,
) -> None:
    """Tests talk to 127.0.0.1 only."""
    assert "connected to 192.0.2.1:80; only this machine is allowed" in outcome
    assert "ERROR" in outcome


def test_a_blocking_call_on_the_loop_fails_the_test_and_is_named(outcome: str) -> None:
    """Blocking work never runs on the event loop."""
    assert "the event loop was blocked by time.sleep in test_blocks_the_loop in the task" in outcome
    assert "the event loop was blocked by Condition.wait in test_waits_on_the_loop in the task" in outcome
    assert "by test_may_run_others" not in outcome


def test_a_computation_on_the_loop_fails_the_test_and_is_named(outcome: str) -> None:
    """It delays every run of a process. The guard measures the processor time of the thread of the loop."""
    assert re.search(
        r"the event loop was kept busy for \d{3,4} ms by test_keeps_the_loop_busy in the", outcome
    )


def test_what_a_test_leaves_open_fails_that_test(outcome: str) -> None:
    """And not the one that happens to run when the garbage collector comes by."""
    found = r"not closed before garbage collection: ResourceWarning\(.unclosed <socket.socket"
    assert re.search(found, outcome)
    assert re.search(r"ERROR \S*test_leaves_a_socket_open", outcome)


def test_a_test_may_block_when_it_says_why(outcome: str) -> None:
    """`allow_blocking(reason=...)` is the way out."""
    assert "PASSED" in outcome
    assert "by test_may_block" not in outcome


def test_an_error_that_nobody_retrieved_fails_the_test(outcome: str) -> None:
    """An exception of a task must be handled."""
    assert "asyncio: Task exception was never retrieved" in outcome


def test_a_test_that_breaks_no_rule_passes(outcome: str) -> None:
    """Six tests break a rule; each fails at its own teardown and not at a neighbour's."""
    assert set(re.findall(r"^ERROR \S*::(\w+)", outcome, re.MULTILINE)) == {
        "test_reaches_out",
        "test_blocks_the_loop",
        "test_keeps_the_loop_busy",
        "test_waits_on_the_loop",
        "test_leaves_a_socket_open",
        "test_loses_an_error",
    }, outcome
    assert len(re.findall(r"^PASSED ", outcome, re.MULTILINE)) == 10
