"""Guards. The only place for rules that every test obeys without naming them.

No connection leaves this machine; no callback blocks an event loop; no task fails or vanishes unheard; what
is opened is closed. What breaks a rule is noted where it happens, also in another thread, and fails the test
once it is torn down, so that no `except` in between can hide it.
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

from tests.blocking import report_blocking_calls

MAX_CPU_S = 0.25  # at 500 runs a process, a quarter of a second is a pause that every one of them feels

_broken: list[str] = []
_blocked: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "allow_blocking(reason): this test blocks its event loop on purpose")
    # A shell lets what it starts in the background ignore SIGINT; so would each process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    """After a test's own fixtures are gone, and with them its loop: which rules did it break?"""
    try:
        yield
    finally:  # also of a fixture that fails: the next test must not be blamed for it
        found = _rules_broken(item, nextitem)
    if found:
        pytest.fail("\n".join(dict.fromkeys(found)), pytrace=False)


def _rules_broken(item: pytest.Item, nextitem: pytest.Item | None) -> list[str]:
    _collect_what_the_test_left(item, nextitem)
    allowed = item.get_closest_marker("allow_blocking")
    found = [*_broken, *(() if allowed else _blocked)]
    if allowed is not None and not (allowed.kwargs.get("reason") or allowed.args):
        found.append("allow_blocking needs a reason")
    _broken.clear()
    _blocked.clear()
    return found


@pytest.fixture(scope="session", autouse=True)
def _guards() -> Generator[None]:
    gc.collect()
    gc.freeze()  # the tests themselves
    patch = pytest.MonkeyPatch()
    _guard_sockets(patch)
    _guard_loops(patch)
    ear = _AsyncioEar(logging.ERROR)
    logging.getLogger("asyncio").addHandler(ear)
    yield
    logging.getLogger("asyncio").removeHandler(ear)
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
# Two rules, and neither looks at the time of day: what a callback computes is measured by the processor time
# of its thread, and what it waits for is known by the call. So a machine that is busy with something else
# makes no test fail.

_thread = threading.local()


def _guard_loops(patch: pytest.MonkeyPatch) -> None:
    original = asyncio.events.Handle._run

    def measured(self: asyncio.Handle) -> None:
        outer = getattr(_thread, "running", None)
        name, began_s = _Name(self), time.thread_time()
        _thread.running = name
        try:
            original(self)
        finally:
            _thread.running = outer
            used_s = time.thread_time() - began_s
        if used_s > MAX_CPU_S:
            _blocked.append(f"the event loop was kept busy for {used_s * 1000:.0f} ms by {name}")

    patch.setattr(asyncio.events.Handle, "_run", measured)
    report_blocking_calls(
        patch,
        lambda: getattr(_thread, "running", None) is not None,
        lambda call: _blocked.append(f"the event loop was blocked by {call} in {_thread.running}"),
    )


class _Name:
    """What a handle runs; taken before it does, because afterwards it forgets, and spelt only when asked."""

    def __init__(self, handle: asyncio.Handle) -> None:
        self._callback = getattr(handle, "_callback", None)

    def __str__(self) -> str:
        task = getattr(self._callback, "__self__", None)
        if isinstance(task, asyncio.Task):
            coroutine = task.get_coro()
            return f"{getattr(coroutine, '__qualname__', coroutine)} in the task {task.get_name()!r}"
        return getattr(self._callback, "__qualname__", repr(self._callback))


# --- no task fails or vanishes unheard -------------------------------------------------------------------


class _AsyncioEar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "never retrieved" in text or "was destroyed" in text:
            _broken.append(f"asyncio: {text}")


# --- what is opened is closed ----------------------------------------------------------------------------


FROZEN_AFTER = 100  # tests of a module: so many leave little enough to look through after each of them

_tests_of_module = 0


def _collect_what_the_test_left(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What a test leaves open warns when it is collected: here, so that no other test is blamed for it.

    To collect everything after each test would take longer than most tests. So what survives a module, above
    all the tests that were collected, is frozen, that is, left out of later collections, until the last test
    of its folder. A long module is frozen in between, and looked through as a whole after its last test.
    """
    global _tests_of_module
    getattr(item, "funcargs", {}).clear()  # pytest lets go of these after the teardown, which is too late
    _tests_of_module += 1
    last_of_module = nextitem is None or nextitem.path != item.path
    last_of_folder = nextitem is None or nextitem.path.parent != item.path.parent
    if last_of_folder or (last_of_module and _tests_of_module >= FROZEN_AFTER):
        gc.unfreeze()
    with _hearing_finalizers():
        gc.collect()
    if last_of_module or _tests_of_module % FROZEN_AFTER == 0:
        gc.freeze()
    if last_of_module:
        _tests_of_module = 0


@contextmanager
def _hearing_finalizers() -> Iterator[None]:
    """Errors in finalizers, which are what `ResourceWarning`s are while warnings are errors."""

    def hear(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value or unraisable.exc_type.__name__
        _broken.append(f"left to the garbage collector: {error!r} in {unraisable.object!r}")

    before, sys.unraisablehook = sys.unraisablehook, hear
    try:
        yield
    finally:
        sys.unraisablehook = before
