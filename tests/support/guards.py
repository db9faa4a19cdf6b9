"""Guards. The only place for rules that are checked in every test.

No connection leaves this machine. No callback blocks an event loop. No task fails or disappears without
notice. Everything that is opened is closed. No agent stays registered. A violation is recorded where it
happens, in any thread. It fails the test after its teardown, so that no `except` can hide it.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.blocking import report_blocking_calls


def _slowness() -> float:
    """How many times slower this machine is than one on which a million additions take 40 ms; at least 1."""
    began_s, total = time.thread_time(), 0
    for number in range(1_000_000):
        total += number
    return max(1.0, (time.thread_time() - began_s) / 0.04)


MAX_CPU_S = 0.25 * _slowness() * (4 if sys.gettrace() is not None else 1)
"""A process may execute 500 runs, and a blocked loop delays them all. To count coverage costs time, too."""

OTHER_SIDE = "model-server"
"""The thread of a model server, which stands for another machine: it may take its time for a huge reply."""

gc.disable()  # until all tests are collected: nothing of that is garbage

_broken: list[str] = []
_blocked: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "allow_blocking(reason): this test blocks its event loop on purpose")
    # A shell starts background processes with SIGINT ignored, and child processes would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    """Check the rules after the teardown of the test's own fixtures, including its event loop."""
    try:
        yield
    finally:  # also if a fixture fails: the next test must not fail for it
        found = _violations(item, nextitem)
    if found:
        pytest.fail("\n".join(dict.fromkeys(found)), pytrace=False)


def _violations(item: pytest.Item, nextitem: pytest.Item | None) -> list[str]:
    _collect_what_the_test_left(item, nextitem)
    allowed = item.get_closest_marker("allow_blocking")
    found = [*_broken, *(() if allowed else _blocked), *_registered_agents()]
    if allowed is not None and not (allowed.kwargs.get("reason") or allowed.args):
        found.append("allow_blocking needs a reason")
    _broken.clear()
    _blocked.clear()
    return found


def _registered_agents() -> list[str]:
    """The agents that a test, or an import of a test file, left registered in the process. Forgets them."""
    code = sys.modules.get("openagents_worker.agents.code")
    if code is None or not (left := [agent.id for agent in code.registered_agents()]):
        return []
    code.unregister_agents()
    return [f"agents stayed registered, and every later test would serve them: {', '.join(left)}"]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    gc.enable()
    if found := _registered_agents():
        pytest.exit(f"collecting the tests: {found[0]}", returncode=2)


@pytest.fixture(scope="session", autouse=True)
def _guards() -> Generator[None]:
    gc.collect()
    gc.freeze()  # the tests themselves
    patch = pytest.MonkeyPatch()
    _guard_sockets(patch)
    _guard_loops(patch)
    handler = _AsyncioLogHandler(logging.ERROR)
    logging.getLogger("asyncio").addHandler(handler)
    yield
    logging.getLogger("asyncio").removeHandler(handler)
    patch.undo()


# --- no network but loopback -----------------------------------------------------------------------------


def _guard_sockets(patch: pytest.MonkeyPatch) -> None:
    for name in ("connect", "connect_ex"):
        original = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: Any, *, _original: Any = original) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
                _broken.append(f"a test connected to {address[0]}:{address[1]}; only this machine is allowed")
                raise ConnectionRefusedError(_broken[-1])
            return _original(self, address)

        patch.setattr(socket.socket, name, guarded)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "")


# --- no callback blocks a loop ---------------------------------------------------------------------------
#
# Two rules, and neither uses wall-clock time: computation is measured by the CPU time of the thread, and
# waiting is detected by the calls that wait. So a busy machine makes no test fail.

SEEN_AGAIN_S = 0.02
"""The processor time of a thread is read again after so long, before the next callback."""

_thread = threading.local()


def _guard_loops(patch: pytest.MonkeyPatch) -> None:
    original = asyncio.events.Handle._run

    def measured(self: asyncio.Handle) -> None:
        outer = getattr(_thread, "running", None)
        name, began_s = _Name(self), time.perf_counter()
        if began_s - getattr(_thread, "seen_s", 0.0) > SEEN_AGAIN_S:
            _thread.seen_s, _thread.used_s = began_s, time.thread_time()
        _thread.running = name
        try:
            original(self)
        finally:
            _thread.running = outer
            # To ask for the processor time needs a system call, which costs more than most callbacks.
            if time.perf_counter() - began_s > MAX_CPU_S:
                used_s = time.thread_time() - _thread.used_s - SEEN_AGAIN_S
                if used_s > MAX_CPU_S and threading.current_thread().name != OTHER_SIDE:
                    _blocked.append(f"the event loop was kept busy for {used_s * 1000:.0f} ms by {name}")

    patch.setattr(asyncio.events.Handle, "_run", measured)
    report_blocking_calls(
        patch,
        lambda: getattr(_thread, "running", None) is not None,
        lambda call: _blocked.append(f"the event loop was blocked by {call} in {_thread.running}"),
    )


class _Name:
    """The name of the callback of a handle.

    It is created before the callback runs, because a handle drops its callback afterwards. The text is built
    only if it is needed.
    """

    def __init__(self, handle: asyncio.Handle) -> None:
        self._callback = getattr(handle, "_callback", None)

    def __str__(self) -> str:
        task = getattr(self._callback, "__self__", None)
        if isinstance(task, asyncio.Task):
            coroutine = task.get_coro()
            return f"{getattr(coroutine, '__qualname__', coroutine)} in the task {task.get_name()!r}"
        return getattr(self._callback, "__qualname__", repr(self._callback))


# --- no task fails or disappears without notice ----------------------------------------------------------


class _AsyncioLogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "never retrieved" in text or "was destroyed" in text:
            _broken.append(f"asyncio: {text}")


# --- what is opened is closed ----------------------------------------------------------------------------


LONG_MODULE = 100
"""After so many tests, the objects that they left are collected at the end of their module."""

_tests_of_module = 0


def _collect_what_the_test_left(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Collect garbage, so that the warnings about open resources appear in the test that left them open.

    A collection of all objects after each test would take longer than most tests. So the objects that survive
    a test are frozen (excluded from later collections) until the last test of the folder or of a long module.
    """
    global _tests_of_module
    getattr(item, "funcargs", {}).clear()  # pytest itself drops them only after the teardown
    _tests_of_module += 1
    last_of_module = nextitem is None or nextitem.path != item.path
    last_of_folder = nextitem is None or nextitem.path.parent != item.path.parent
    if last_of_folder or (last_of_module and _tests_of_module >= LONG_MODULE):
        gc.unfreeze()
    with _recording_finalizer_errors():
        gc.collect()
    gc.freeze()
    if last_of_module:
        _tests_of_module = 0


@contextmanager
def _recording_finalizer_errors() -> Iterator[None]:
    """Record errors in finalizers. A `ResourceWarning` is such an error, because warnings are errors."""

    def record(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value or unraisable.exc_type.__name__
        _broken.append(f"not closed before garbage collection: {error!r} in {unraisable.object!r}")

    before, sys.unraisablehook = sys.unraisablehook, record
    try:
        yield
    finally:
        sys.unraisablehook = before
