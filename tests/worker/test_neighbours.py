"""Neighbours: whether another process of this host is alive, told exactly and never wrongly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import pytest

from openagents_worker.worker import local_processes as neighbours
from openagents_worker.worker.local_processes import (
    LocalProcessWatch,
    ProcessIdentity,
    Sign,
    sign_of,
    this_process,
)
from tests.waiting import wait_for

own = this_process()
pytestmark = pytest.mark.skipif(own is None, reason="this system does not say when a process started")


@pytest.fixture
def child() -> Generator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed, and is a zombie until the test reaps it."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def identity(pid: int) -> str:
    """As the process itself would have registered."""
    return f"{pid} {neighbours._Stat.of(pid, neighbours.PROC).started}"


def test_a_process_that_runs_is_alive(child: subprocess.Popen[bytes]) -> None:
    """As registered, so it is found."""
    assert sign_of(identity(child.pid)) is Sign.ALIVE


def test_a_stopped_process_is_alive(child: subprocess.Popen[bytes]) -> None:
    """SIGSTOP is no death: the process may go on, and only its lease tells when it has waited too long."""
    process = identity(child.pid)
    child.send_signal(signal.SIGSTOP)
    wait_for(lambda: neighbours._Stat.of(child.pid, neighbours.PROC).state == "T", "the process is stopped")

    assert sign_of(process) is Sign.ALIVE


def test_a_zombie_is_dead(child: subprocess.Popen[bytes]) -> None:
    """Nobody has reaped it yet; it will never do anything again."""
    process = identity(child.pid)
    child.send_signal(signal.SIGKILL)
    wait_for(lambda: neighbours._Stat.of(child.pid, neighbours.PROC).state == "Z", "the child is a zombie")

    assert sign_of(process) is Sign.DEAD


def test_a_first_thread_that_ends_before_the_others_is_no_death() -> None:
    """The process looks like a zombie while another of its threads works on."""
    code = (
        "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(600,)).start();"
        "print('ready', flush=True); ctypes.CDLL(None).pthread_exit(None)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        registered = identity(process.pid)
        try:
            wait_for(
                lambda: neighbours._Stat.of(process.pid, neighbours.PROC).state == "Z",
                "the first thread ended",
            )
            assert sign_of(registered) is Sign.ALIVE
        finally:
            process.kill()


def test_a_process_that_is_gone_is_dead(child: subprocess.Popen[bytes]) -> None:
    """Killed and reaped."""
    process = identity(child.pid)
    child.kill()
    child.wait()

    assert sign_of(process) is Sign.DEAD


def test_another_process_with_the_same_id_is_a_death(child: subprocess.Popen[bytes]) -> None:
    """Process ids are used again; with their start time they are not."""
    pid, started = identity(child.pid).split()

    assert sign_of(f"{pid} {int(started) - 1}") is Sign.DEAD


def test_a_process_that_may_not_be_seen_is_not_judged(tmp_path: Path) -> None:
    """Where /proc hides other users' processes (`hidepid`) nothing is known of them: their lease decides."""
    assert sign_of(f"{os.getpid()} 1", proc=tmp_path) is Sign.UNKNOWN
    assert sign_of("no process at all") is Sign.UNKNOWN


def test_a_system_that_does_not_say_who_one_is_has_no_neighbours(tmp_path: Path) -> None:
    """Without a boot id, or with another name space's /proc, no process is compared with anything."""
    assert this_process(proc=tmp_path) is None
    (tmp_path / "self").symlink_to("1")
    assert this_process(proc=tmp_path) is None


def test_both_processes_of_a_host_name_the_same_host() -> None:
    """The host is the boot and the name spaces; the process is its id and start time."""
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
    """Who was seen to be dead."""
    return {}


@pytest.fixture(params=["pidfd", "/proc"])
def watching(
    request: pytest.FixtureRequest, seen: dict[str, ProcessIdentity]
) -> Generator[LocalProcessWatch]:
    """Neighbours that are watched by each of the two ways there are."""
    if request.param == "pidfd" and not hasattr(os, "pidfd_open"):
        pytest.skip("this system has no pidfd")
    assert own is not None
    watched = LocalProcessWatch(
        own, on_dead=seen.update, open_pidfd=os.pidfd_open if request.param == "pidfd" else None
    )
    watched.start()
    yield watched
    watched.stop()


def test_a_neighbour_that_is_killed_is_seen_dead_and_the_others_are_not(
    watching: LocalProcessWatch, seen: Mapping[str, ProcessIdentity], child: subprocess.Popen[bytes]
) -> None:
    """Also before anybody has reaped it."""
    assert own is not None
    process = identity(child.pid)
    watching.watch({"victim": process, "parent": identity(os.getppid()), "self": own.process})

    child.send_signal(signal.SIGKILL)

    wait_for(lambda: seen, "the death was seen")
    assert seen == {"victim": ProcessIdentity(own.host, process)}


def test_who_died_before_it_was_watched_is_seen_at_once(
    watching: LocalProcessWatch, seen: Mapping[str, ProcessIdentity], child: subprocess.Popen[bytes]
) -> None:
    """A worker that starts finds what its host has left behind."""
    process = identity(child.pid)
    child.kill()
    child.wait()

    watching.watch({"left behind": process})

    wait_for(lambda: list(seen) == ["left behind"], "the death was seen")


def test_a_death_is_told_again_while_its_lease_lasts(
    watching: LocalProcessWatch, seen: dict[str, ProcessIdentity], child: subprocess.Popen[bytes]
) -> None:
    """Redis was away when it was told first: the next beat names the incarnation again."""
    process = identity(child.pid)
    child.send_signal(signal.SIGKILL)
    watching.watch({"victim": process})
    wait_for(lambda: seen, "the death was seen")
    seen.clear()

    watching.watch({"victim": process})

    wait_for(lambda: list(seen) == ["victim"], "the death was seen again")


def test_a_neighbour_that_has_retired_is_not_looked_at_any_more(
    watching: LocalProcessWatch, seen: Mapping[str, ProcessIdentity], child: subprocess.Popen[bytes]
) -> None:
    """Its process may live or die: it holds no lease."""
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
