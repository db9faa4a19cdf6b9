"""The stall monitor: it kills a process whose interpreter is stalled, and names the run that caused it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from openagents_worker.worker import stall_monitor as monitor
from tests.support.waiting import PATIENCE_S, wait_for

ROOT = Path(__file__).parents[2]


class MonitoredProcess:
    """A process with a stall monitor that stalls as requested (`stalling_process`)."""

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
        """`before` is the command prefix that starts it."""
        self._log = folder / "log"
        command = [*before, sys.executable, "-m", "tests.worker.stalling_process", url, where, how]
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, str(dead_s), str(lease_s)],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "OPENAGENTS_LOG_MAX_VALUE_LENGTH": "5000"},
            )
        wait_for(
            lambda: "ready" in self.log or self.process.poll() is not None, "the process is ready", PATIENCE_S
        )
        self.monitor = int(self.log.partition("ready ")[2].split()[0])

    @property
    def log(self) -> str:
        return self._log.read_text()

    def line(self, event: str) -> str:
        return next((line for line in self.log.splitlines() if f" {event} " in line), "")

    def end(self) -> int:
        """Wait for its exit code; its monitor has then ended too."""
        code = wait_for(lambda: str(self.process.poll() or ""), "the process has ended", PATIENCE_S)
        wait_for(lambda: not lives(self.monitor), "its monitor has ended", PATIENCE_S)
        return int(code)


StartProcess = Callable[..., MonitoredProcess]


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


@pytest.fixture
def monitored(tmp_path: Path, redis_url: str) -> Generator[StartProcess]:
    made: list[MonitoredProcess] = []

    def make(
        where: str, how: str, *, dead_s: float = 1.5, lease_s: float = 60.0, url: str = redis_url
    ) -> MonitoredProcess:
        made.append(MonitoredProcess(tmp_path, url, where, how, dead_s=dead_s, lease_s=lease_s))
        return made[-1]

    yield make
    for one in made:
        with suppress(ProcessLookupError):
            one.process.send_signal(signal.SIGCONT)
        one.process.kill()
        one.process.wait()


@pytest.mark.share(of=3)
@pytest.mark.parametrize(
    ("where", "how"),
    [
        ("loop", "regex"),
        ("idle", "sleep 600"),  # by the first run after an idle time
        ("thread", "power"),
        pytest.param("loop", "power", marks=pytest.mark.slow),
        pytest.param("thread", "regex", marks=pytest.mark.slow),
    ],
)
def test_the_run_that_holds_the_gil_is_named(monitored: StartProcess, where: str, how: str) -> None:
    """With run, agent, plugin and the stacks of all threads, whether it computes or sleeps."""
    one = monitored(where, how)

    assert one.end() == -signal.SIGKILL
    line = one.line("loop.dead")
    assert "run_id=r1 agent_id=shop" in line
    assert ('plugin="pattern shop.Careful"' if where != "thread" else 'plugin="tool search"') in line
    assert "hold_the_interpreter" in line
    assert "exit_code=137" in line
    assert "run.accused run_id=r1 incarnation=w1@test:1" in one.log
    assert one.log.count(" thread.stack ") >= 3
    assert "done" not in one.log


@pytest.mark.long
def test_a_lease_that_ends_is_the_limit_too(monitored: StartProcess) -> None:
    """Nothing renews it, so other workers take the runs: the process must not continue. It handles no SIGTERM
    meanwhile."""
    one = monitored("loop", "regex", dead_s=600, lease_s=4)

    one.process.terminate()  # no Python handler is called

    assert one.end() == -signal.SIGKILL
    assert "run_id=r1" in one.line("loop.dead")


@pytest.mark.slow
def test_no_run_is_accused_if_two_threads_may_hold_the_gil(monitored: StartProcess) -> None:
    """One thread sleeps with the GIL, another without it: both are logged, and the process ends."""
    one = monitored("two threads", "sleep 600")  # neither thread computes

    assert one.end() == -signal.SIGKILL
    assert "run.accused" not in one.log
    assert '"run_id": "r2", "agent_id": "bank", "plugin": "tool wait"' in one.line("loop.dead")


@pytest.mark.slow
def test_no_run_is_accused_for_a_thread_without_a_run(monitored: StartProcess) -> None:
    one = monitored("unknown thread", "regex")

    assert one.end() == -signal.SIGKILL
    assert "run.accused" not in one.log
    assert "other_threads=1" in one.line("loop.dead")
    assert "hold_the_interpreter" in one.log


@pytest.mark.long
def test_without_redis_the_process_is_still_ended(
    monitored: StartProcess,
) -> None:
    one = monitored("loop", "regex", url="redis://127.0.0.1:1/0")  # no server listens there

    assert one.end() == -signal.SIGKILL
    assert "run.not_accused" in one.log
    assert "run_id=r1" in one.line("loop.dead")


@pytest.mark.long
def test_process_1_of_a_container_is_ended(tmp_path: Path, redis_url: str) -> None:
    """It cannot be killed from inside; its exit code is the number of another signal."""
    before = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*before, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not create a namespace of process ids")
    one = MonitoredProcess(tmp_path, redis_url, "loop", "regex", dead_s=1.5, lease_s=60, before=before)
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


@pytest.mark.long
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
def test_a_process_that_releases_the_gil_is_not_ended(
    monitored: StartProcess, where: str, how: str, dead_s: float
) -> None:
    """However long it computes or waits: the loop watchdog handles a blocked loop."""
    one = monitored(where, how, dead_s=dead_s)

    assert wait_for(lambda: one.process.poll() is not None, "the process has ended by itself", PATIENCE_S)
    assert one.process.returncode == 0
    assert "done" in one.log
    assert "loop.dead" not in one.log
    assert not lives(one.monitor)


@pytest.mark.long
def test_a_stopped_process_is_not_ended(monitored: StartProcess) -> None:
    """Even beyond every limit and its lease, because a stopped process cannot act."""
    one = monitored("loop", "stop", dead_s=1.0, lease_s=2.0)
    wait_for(
        lambda: "T (stopped)" in Path(f"/proc/{one.process.pid}/status").read_text(), "the process is stopped"
    )

    until_checks(one.monitor, 12)  # three seconds
    one.process.send_signal(signal.SIGCONT)

    assert one.process.wait(PATIENCE_S) == 0
    assert "loop.dead" not in one.log


@pytest.mark.long
@pytest.mark.parametrize(
    ("niceness", "how"), [(10, "python 5000"), pytest.param(19, "python 200000", marks=pytest.mark.slow)]
)
def test_a_process_without_a_core_is_not_ended(monitored: StartProcess, niceness: int, how: str) -> None:
    """Other processes with a higher priority use all cores."""
    one = monitored("loop", how, dead_s=1.0)
    os.setpriority(os.PRIO_PROCESS, one.process.pid, niceness)
    hogs = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        assert wait_for(
            lambda: one.process.poll() is not None, "the process has ended by itself", 4 * PATIENCE_S
        )
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()

    assert one.process.returncode == 0
    assert "loop.dead" not in one.log


def until_checks(monitor: int, count: int) -> None:
    """Wait for `count` checks of the monitor: its only thread sleeps once per check."""

    def sleeps() -> int:
        status = Path(f"/proc/{monitor}/status").read_text()
        return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    first = sleeps()
    wait_for(lambda: sleeps() >= first + count, f"the monitor has made {count} checks", PATIENCE_S)


# --- where it logs --------------------------------------------------------------------------------------


def test_it_logs_where_the_worker_logs(tmp_path: Path) -> None:
    """Also to a file; and to standard error without a configured log."""
    logger, file = logging.getLogger("openagents_worker"), logging.FileHandler(tmp_path / "worker.log")
    before, without = logger.handlers[:], logging.NullHandler()
    logger.handlers[:] = [without, file]
    try:
        assert monitor._log_stream() == file.stream.fileno()
    finally:
        logger.handlers[:] = before
        file.close()


# --- its start and end
# --------------------------------------------------------------------------------------------


def test_a_monitor_ends_with_a_process_that_is_killed(monitored: StartProcess) -> None:
    one = monitored("loop", "wait 600")

    one.process.kill()

    assert one.end() == -signal.SIGKILL
    assert "loop.dead" not in one.log


def test_a_monitor_that_was_killed_is_reported(monitored: StartProcess) -> None:
    """The worker continues and logs it."""
    one = monitored("loop", "wait 600")

    os.kill(one.monitor, signal.SIGKILL)

    wait_for(lambda: "guard.ended" in one.log, "it is logged", PATIENCE_S)
    assert one.process.poll() is None


def test_a_monitor_has_only_the_files_that_it_needs(monitored: StartProcess) -> None:
    """It has no socket of the worker, and uses little memory."""
    one = monitored("loop", "wait 600")
    until_checks(one.monitor, 2)

    links = [str(entry.readlink()) for entry in Path(f"/proc/{one.monitor}/fd").iterdir()]
    assert not [link for link in links if link.startswith("socket:")]
    assert len(links) <= 5
    rss_kb = int(Path(f"/proc/{one.monitor}/status").read_text().partition("\nVmRSS:")[2].split()[0])
    assert rss_kb < 16_000
