"""The guard: a process whose interpreter stands still is ended from outside, and who did it is named."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from openagents_worker.worker import stall_monitor as guard
from tests.waiting import PATIENCE_S, wait_for

ROOT = Path(__file__).parents[2]


class Guarded:
    """A process with a guard, which does what it is told (`standing_still`)."""

    def __init__(
        self,
        folder: Path,
        url: str,
        where: str,
        how: str,
        *,
        dead_s: float,
        lease_s: float,
        before: Sequence[str] = (),
    ) -> None:
        """`before` is the beginning of a command that starts it."""
        self._log = folder / "log"
        command = [*before, sys.executable, "-m", "tests.worker.standing_still", url, where, how]
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, str(dead_s), str(lease_s)],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "OPENAGENTS_LOG_MAX_VALUE_LENGTH": "5000"},
            )
        wait_for(lambda: "ready" in self.log or self.process.poll() is not None, "it is ready", PATIENCE_S)
        self.guard = int(self.log.partition("ready ")[2].split()[0])

    @property
    def log(self) -> str:
        return self._log.read_text()

    def line(self, event: str) -> str:
        return next((line for line in self.log.splitlines() if f" {event} " in line), "")

    def end(self) -> int:
        """Its exit code, once it has one; then its guard has ended, too."""
        code = wait_for(lambda: str(self.process.poll() or ""), "the process has been ended", PATIENCE_S)
        wait_for(lambda: not lives(self.guard), "its guard has ended", PATIENCE_S)
        return int(code)


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


@pytest.fixture
def guarded(tmp_path: Path, redis_url: str) -> Generator[type[Guarded]]:
    made: list[Guarded] = []

    def make(
        where: str, how: str, *, dead_s: float = 1.5, lease_s: float = 60.0, url: str = redis_url
    ) -> Guarded:
        made.append(Guarded(tmp_path, url, where, how, dead_s=dead_s, lease_s=lease_s))
        return made[-1]

    yield make  # type: ignore[misc]
    for one in made:
        with suppress(ProcessLookupError):
            one.process.send_signal(signal.SIGCONT)
        one.process.kill()
        one.process.wait()


@pytest.mark.parametrize(
    ("where", "how"),
    [
        ("loop", "regex"),
        ("idle", "sleep 600"),  # by the first run after a while without any
        ("thread", "power"),
        pytest.param("loop", "power", marks=pytest.mark.slow),
        pytest.param("thread", "regex", marks=pytest.mark.slow),
    ],
)
def test_whoever_keeps_the_interpreter_is_named(guarded: type[Guarded], where: str, how: str) -> None:
    """With run, agent, plugin and the stacks of all threads; whether it computes or sleeps."""
    one = guarded(where, how)

    assert one.end() == -signal.SIGKILL
    line = one.line("loop.dead")
    assert "run_id=r1 agent_id=shop" in line
    assert ('plugin="pattern shop.Careful"' if where != "thread" else 'plugin="tool search"') in line
    assert "hold_the_interpreter" in line
    assert "exit_code=137" in line
    assert "run.accused run_id=r1 incarnation=w1@test:1" in one.log
    assert one.log.count(" thread.stack ") >= 3
    assert "done" not in one.log


def test_a_lease_that_ends_is_the_limit_too(guarded: type[Guarded]) -> None:
    """Nothing renews it, so others take the runs from then on: the process must not go on beside them. It
    does not obey SIGTERM meanwhile."""
    one = guarded("loop", "regex", dead_s=600, lease_s=4)

    one.process.terminate()  # which no handler of Python's sees

    assert one.end() == -signal.SIGKILL
    assert "run_id=r1" in one.line("loop.dead")


@pytest.mark.slow
def test_nobody_is_accused_where_two_may_have_done_it(guarded: type[Guarded]) -> None:
    """One thread sleeps with the interpreter, another without: both are shown, and the process ends."""
    one = guarded("two threads", "sleep 600")  # neither computes

    assert one.end() == -signal.SIGKILL
    assert "run.accused" not in one.log
    assert '"run_id": "r2", "agent_id": "bank", "plugin": "tool wait"' in one.line("loop.dead")


@pytest.mark.slow
def test_nobody_is_accused_for_a_thread_of_no_run(guarded: type[Guarded]) -> None:
    one = guarded("nobody", "regex")

    assert one.end() == -signal.SIGKILL
    assert "run.accused" not in one.log
    assert "other_threads=1" in one.line("loop.dead")
    assert "hold_the_interpreter" in one.log


def test_without_redis_the_process_is_ended_all_the_same(
    guarded: type[Guarded],
) -> None:
    one = guarded("loop", "regex", url="redis://127.0.0.1:1/0")  # nobody listens there

    assert one.end() == -signal.SIGKILL
    assert "run.not_accused" in one.log
    assert "run_id=r1" in one.line("loop.dead")


def test_process_1_of_a_container_is_ended_too(tmp_path: Path, redis_url: str) -> None:
    """The kernel lets nobody kill it from inside; its exit code is the number of another signal."""
    before = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*before, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system or user may not make a name space of process ids")
    one = Guarded(tmp_path, redis_url, "loop", "regex", dead_s=1.5, lease_s=60, before=before)
    try:
        code = one.process.wait(PATIENCE_S)
    finally:
        one.process.kill()
        one.process.wait()

    assert f"exit_code={code}" in one.line("loop.dead")
    assert signal.SIGRTMIN <= code <= signal.SIGRTMAX
    assert "pid=1 " in one.line("loop.dead")
    assert "run.accused run_id=r1" in one.log


# --- false alarms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "how", "dead_s"),
    [
        pytest.param("loop", "python 150000", 1.0, marks=pytest.mark.slow),
        ("loop", "wait 2", 1.0),
        ("thread", "multiply 4000000", 10.0),
        pytest.param("thread", "python 300000", 1.0, marks=pytest.mark.slow),
        pytest.param("thread", "wait 4", 1.0, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_lets_others_run_is_left_alone(
    guarded: type[Guarded], where: str, how: str, dead_s: float
) -> None:
    """However long it computes or waits: a loop that is blocked is the watchdog's to judge."""
    one = guarded(where, how, dead_s=dead_s)

    assert wait_for(lambda: one.process.poll() is not None, "it has ended by itself", PATIENCE_S)
    assert one.process.returncode == 0
    assert "done" in one.log
    assert "loop.dead" not in one.log
    assert not lives(one.guard)


def test_a_process_that_is_stopped_is_left_alone(guarded: type[Guarded]) -> None:
    """For longer than any limit; also when its lease is over, as it can do nothing beside others."""
    one = guarded("loop", "stop", dead_s=1.0, lease_s=2.0)
    wait_for(lambda: "T (stopped)" in Path(f"/proc/{one.process.pid}/status").read_text(), "it is stopped")

    until_looks(one.guard, 12)  # three seconds
    one.process.send_signal(signal.SIGCONT)

    assert one.process.wait(PATIENCE_S) == 0
    assert "loop.dead" not in one.log


@pytest.mark.parametrize(
    ("niceness", "how"), [(10, "python 15000"), pytest.param(19, "python 200000", marks=pytest.mark.slow)]
)
def test_a_process_that_gets_no_core_is_left_alone(guarded: type[Guarded], niceness: int, how: str) -> None:
    """Others use all of them, and are preferred."""
    one = guarded("loop", how, dead_s=1.0)
    os.setpriority(os.PRIO_PROCESS, one.process.pid, niceness)
    hogs = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        assert wait_for(lambda: one.process.poll() is not None, "it has ended by itself", 4 * PATIENCE_S)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()

    assert one.process.returncode == 0
    assert "loop.dead" not in one.log


def until_looks(guard: int, count: int) -> None:
    """The guard has looked so often: each look is a sleep of its only thread."""

    def sleeps() -> int:
        status = Path(f"/proc/{guard}/status").read_text()
        return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    first = sleeps()
    wait_for(lambda: sleeps() >= first + count, f"the guard has looked {count} times", PATIENCE_S)


# --- where it writes --------------------------------------------------------------------------------------


def test_it_writes_where_the_worker_logs(tmp_path: Path) -> None:
    """Also where that is a file; and to the error output where nobody has set up a log."""
    logger, file = logging.getLogger("openagents_worker"), logging.FileHandler(tmp_path / "worker.log")
    before, without = logger.handlers[:], logging.NullHandler()
    logger.handlers[:] = [without, file]
    try:
        assert guard._log_stream() == file.stream.fileno()
    finally:
        logger.handlers[:] = before
        file.close()


# --- its life --------------------------------------------------------------------------------------------


def test_a_guard_ends_with_a_process_that_is_killed(guarded: type[Guarded]) -> None:
    one = guarded("loop", "wait 600")

    one.process.kill()

    assert one.end() == -signal.SIGKILL
    assert "loop.dead" not in one.log


def test_a_guard_that_was_killed_is_missed(guarded: type[Guarded]) -> None:
    """The worker goes on, and says so."""
    one = guarded("loop", "wait 600")

    os.kill(one.guard, signal.SIGKILL)

    wait_for(lambda: "guard.ended" in one.log, "it is said", PATIENCE_S)
    assert one.process.poll() is None


def test_a_guard_has_nothing_open_but_what_it_needs(guarded: type[Guarded]) -> None:
    """No socket of the worker, and little memory."""
    one = guarded("loop", "wait 600")
    until_looks(one.guard, 2)

    links = [str(entry.readlink()) for entry in Path(f"/proc/{one.guard}/fd").iterdir()]
    assert not [link for link in links if link.startswith("socket:")]
    assert len(links) <= 5
    rss_kb = int(Path(f"/proc/{one.guard}/status").read_text().partition("\nVmRSS:")[2].split()[0])
    assert rss_kb < 16_000
