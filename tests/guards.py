"""Guards. The only place for rules that every test obeys without naming them.

No connection leaves this machine; no callback blocks an event loop; no task fails or vanishes unheard. What
breaks a rule is noted where it happens, also in another thread, and fails the test once it is torn down, so
that no `except` in between can hide it.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

MAX_BLOCK_S = 0.25  # at 500 runs a process, a quarter of a second is a pause that every one of them feels

_broken: list[str] = []
_blocked: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "allow_blocking(reason): this test blocks its event loop on purpose")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """After a test's own fixtures are gone, and with them its loop: which rules did it break?"""
    yield
    gc.collect(1)  # a task that nobody holds says so when it is collected
    allowed = item.get_closest_marker("allow_blocking")
    assert allowed is None or allowed.kwargs.get("reason") or allowed.args, "allow_blocking needs a reason"
    found = [*_broken, *(() if allowed else _blocked)]
    _broken.clear()
    _blocked.clear()
    if found:
        pytest.fail("\n".join(dict.fromkeys(found)), pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _guards() -> Generator[None]:
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


# --- no blocking call on a loop --------------------------------------------------------------------------


def _guard_loops(patch: pytest.MonkeyPatch) -> None:
    original = asyncio.events.Handle._run

    def measured(self: asyncio.Handle) -> None:
        name, began = _Name(self), time.monotonic()
        waited = _waited_lately_s(began)
        original(self)
        blocked = time.monotonic() - began
        if blocked > MAX_BLOCK_S and blocked - (_waited_s() - waited) > MAX_BLOCK_S:
            _blocked.append(f"the event loop was blocked for {blocked * 1000:.0f} ms by {name}")

    patch.setattr(asyncio.events.Handle, "_run", measured)


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


_lately = threading.local()


def _waited_lately_s(now: float) -> float:
    """As `_waited_s`, at most 50 ms old: asking the kernel at every callback would slow the tests."""
    if now - getattr(_lately, "asked", 0.0) > 0.05:
        _lately.asked, _lately.waited = now, _waited_s()
    waited: float = _lately.waited
    return waited


def _waited_s() -> float:
    """How long this thread was ready but had no core, in its whole life: then nobody blocked its loop."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_bytes().split()[1]) / 1e9
    except OSError:
        return 0.0  # not Linux: a busy machine may look like a blocked loop there


# --- no task fails or vanishes unheard -------------------------------------------------------------------


class _AsyncioEar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "never retrieved" in text or "was destroyed" in text:
            _broken.append(f"asyncio: {text}")
