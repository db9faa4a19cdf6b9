"""Local processes: whether another process of this host is alive, exactly and without false results."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import pytest

from openagents_worker.worker import local_processes as local_processes
from openagents_worker.worker.local_processes import (
    LocalProcessWatch,
    ProcessIdentity,
    ProcessState,
    process_state,
    this_process,
)
from tests.support.waiting import wait_for

own = this_process()
pytestmark = pytest.mark.skipif(own is None, reason="this system does not show the start time of a process")


@pytest.fixture
def child() -> Generator[subprocess.Popen[bytes]]:
    """A process that runs until it is killed, and is a zombie until the test reaps it."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def identity(pid: int) -> str:
    """The identity that the process itself would register."""
    return f"{pid} {local_processes._Stat.of(pid, local_processes.PROC).started}"


def test_a_process_that_runs_is_alive(child: subprocess.Popen[bytes]) -> None:
    """Its registered identity matches."""
    assert process_state(identity(child.pid)) is ProcessState.ALIVE


def test_a_stopped_process_is_alive(child: subprocess.Popen[bytes]) -> None:
    """A stopped process may continue; only its lease limits how long."""
    process = identity(child.pid)
    child.send_signal(signal.SIGSTOP)
    wait_for(
        lambda: local_processes._Stat.of(child.pid, local_processes.PROC).state == "T",
        "the process is stopped",
    )

    assert process_state(process) is ProcessState.ALIVE


def test_a_zombie_is_dead(child: subprocess.Popen[bytes]) -> None:
    """It is not reaped yet, but will never run again."""
    process = identity(child.pid)
    child.send_signal(signal.SIGKILL)
    wait_for(
        lambda: local_processes._Stat.of(child.pid, local_processes.PROC).state == "Z",
        "the child is a zombie",
    )

    assert process_state(process) is ProcessState.DEAD


def test_a_process_whose_main_thread_has_ended_is_alive() -> None:
    """The process looks like a zombie while another thread still runs."""
    code = (
        "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(600,)).start();"
        "print('ready', flush=True); ctypes.CDLL(None).pthread_exit(None)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        registered = identity(process.pid)
        try:
            wait_for(
                lambda: local_processes._Stat.of(process.pid, local_processes.PROC).state == "Z",
                "the first thread ended",
            )
            assert process_state(registered) is ProcessState.ALIVE
        finally:
            process.kill()


def test_a_process_that_is_gone_is_dead(child: subprocess.Popen[bytes]) -> None:
    """Killed and reaped."""
    process = identity(child.pid)
    child.kill()
    child.wait()

    assert process_state(process) is ProcessState.DEAD


def test_a_process_id_that_was_reused_means_dead(child: subprocess.Popen[bytes]) -> None:
    """Process ids are reused, but not with the same start time."""
    pid, started = identity(child.pid).split()

    assert process_state(f"{pid} {int(started) - 1}") is ProcessState.DEAD


def test_a_hidden_process_is_unknown(tmp_path: Path) -> None:
    """If /proc hides processes of other users (`hidepid`), their leases decide."""
    assert process_state(f"{os.getpid()} 1", proc=tmp_path) is ProcessState.UNKNOWN
    assert process_state("no process at all") is ProcessState.UNKNOWN


def test_a_process_without_an_identity_compares_no_processes(tmp_path: Path) -> None:
    """Without a boot id, or with the /proc of another namespace, `this_process` is None."""
    assert this_process(proc=tmp_path) is None
    (tmp_path / "self").symlink_to("1")
    assert this_process(proc=tmp_path) is None


def test_both_processes_of_a_host_name_the_same_host() -> None:
    """The host is the boot id and the namespaces; the process is its id and start time."""
    code = (
        "from openagents_worker.worker.local_processes import this_process; own = this_process();"
        "print(own.host, own.process, sep='|')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout

    host, process = out.strip().split("|")

    assert own is not None
    assert host == own.host
    assert process != own.process


# --- watching --------------------------------------------------------------------------------------------

Watch = Callable[..., LocalProcessWatch]


@pytest.fixture
def seen() -> dict[str, ProcessIdentity]:
    """The reported dead processes by incarnation."""
    return {}


@pytest.fixture(params=["pidfd", "/proc"])
def watching(
    request: pytest.FixtureRequest, seen: dict[str, ProcessIdentity]
) -> Generator[LocalProcessWatch]:
    """A watch with pidfds, and one that reads /proc."""
    if request.param == "pidfd" and not hasattr(os, "pidfd_open"):
        pytest.skip("this system has no pidfd")
    assert own is not None
    watched = LocalProcessWatch(
        own, on_dead=seen.update, open_pidfd=os.pidfd_open if request.param == "pidfd" else None
    )
    watched.start()
    yield watched
    watched.stop()


def test_only_the_killed_process_is_reported_dead(
    watching: LocalProcessWatch, seen: Mapping[str, ProcessIdentity], child: subprocess.Popen[bytes]
) -> None:
    """Before it is reaped."""
    assert own is not None
    process = identity(child.pid)
    watching.watch({"victim": process, "parent": identity(os.getppid()), "self": own.process})

    child.send_signal(signal.SIGKILL)

    wait_for(lambda: seen, "the death was seen")
    assert seen == {"victim": ProcessIdentity(own.host, process)}


def test_a_process_that_died_before_the_watch_is_reported_at_once(
    watching: LocalProcessWatch, seen: Mapping[str, ProcessIdentity], child: subprocess.Popen[bytes]
) -> None:
    """A starting worker detects workers of its host that died before."""
    process = identity(child.pid)
    child.kill()
    child.wait()

    watching.watch({"left behind": process})

    wait_for(lambda: list(seen) == ["left behind"], "the death was seen")


def test_a_death_is_reported_again_while_its_lease_lasts(
    watching: LocalProcessWatch, seen: dict[str, ProcessIdentity], child: subprocess.Popen[bytes]
) -> None:
    """If Redis was unreachable at the first report, the next heartbeat names the incarnation again."""
    process = identity(child.pid)
    child.send_signal(signal.SIGKILL)
    watching.watch({"victim": process})
    wait_for(lambda: seen, "the death was seen")
    seen.clear()

    watching.watch({"victim": process})

    wait_for(lambda: list(seen) == ["victim"], "the death was seen again")


def test_a_retired_worker_is_not_watched(
    watching: LocalProcessWatch, seen: Mapping[str, ProcessIdentity], child: subprocess.Popen[bytes]
) -> None:
    """It holds no lease, so its death does not matter."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        watching.watch({"retired": identity(child.pid), "other": identity(other.pid)})
        watching.watch({"other": identity(other.pid)})
        wait_for(lambda: "retired" not in watching._pidfds and "other" in watching._pidfds, "it is forgotten")

        child.kill()
        other.kill()

        wait_for(lambda: seen, "the other's death was seen")
        assert list(seen) == ["other"]
    finally:
        other.wait()
